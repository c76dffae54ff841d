"""Triton's kernels without a GPU: what its interpreter computes, and that compilers take them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from inlay.kernels import cross_entropy_triton, elementwise_triton, gpu, nf4_triton

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FOUR = {"BLOCK": 64, "DOUBLE": True}
TILE = {"EIGHT": False, "HEIGHT": nf4_triton.HEIGHT, "WIDTH": nf4_triton.WIDTH}
EIGHT = {"BLOCK": 1, "DOUBLE": False, "EIGHT": True} | dict.fromkeys(("nested", "levels", "table"))
ROWS = elementwise_triton._rows_of(300, 2048)[1]
PIECE = {"PIECE": elementwise_triton.PIECE}
CHUNK = {"PIECE": cross_entropy_triton.PIECE}
KERNELS = {
    "numbers": (nf4_triton._numbers, FOUR | {"BLOCKS": 64}),
    "numbers in int8": (nf4_triton._numbers_of_rows, {"PIECE": nf4_triton.PIECE}),
    "x W^T": (nf4_triton._linear, TILE | FOUR),
    "x W^T in int8": (nf4_triton._linear, TILE | EIGHT | {"bias": None}),
    "dy W": (nf4_triton._product, TILE | FOUR),
    "dy W in int8": (nf4_triton._product, TILE | EIGHT),
    "norm": (elementwise_triton._norms, ROWS | {"PLUS_ONE": False}),
    "norm of 1 + w": (elementwise_triton._norms, ROWS | {"PLUS_ONE": True}),
    "norm back": (elementwise_triton._norms_back, ROWS | {"PLUS_ONE": True}),
    "silu": (elementwise_triton._gates, PIECE | {"GELU": False}),
    "gelu": (elementwise_triton._gates, PIECE | {"GELU": True}),
    "silu back": (elementwise_triton._gates_back, PIECE | {"GELU": False}),
    "gelu back": (elementwise_triton._gates_back, PIECE | {"GELU": True}),
    "softmax": (cross_entropy_triton._log_softmaxes, CHUNK | {"CAPPED": False, "factors": None}),
    "softmax's slope": (cross_entropy_triton._log_softmaxes, CHUNK | {"CAPPED": True}),
}
OF_DTYPE = ("x", "grad", "bias", "out", "weight", "gate", "up", "one", "two", "z")
SINGLE = ("nested", "levels", "table", "sums", "factors", "found")


@pytest.mark.slow
def test_the_kernels_compute_what_plain_torch_does():
    """In a process of its own: that Triton interprets is settled when it is imported."""
    cases = [str(Path(__file__).parent / f"interpreted_{name}.py") for name in ("triton", "passes")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def compiled(name: str, dtype: torch.dtype, capability: tuple[int, int], fused: bool = False):
    """Return the assembly of a kernel for a card of this compute capability."""
    kernel, settings = KERNELS[name]
    eight = "int8" in name
    known = dict.fromkeys(SINGLE, "*fp32") | dict.fromkeys(OF_DTYPE, f"*{NAMES[dtype]}")
    known |= {"codes": "*i8" if eight else "*u8", "absmax": "*fp32" if eight else "*u8"}
    known |= {"targets": "*i64"} | dict.fromkeys(("offset", "eps", "inverse"), "fp32")
    kinds = {n: known.get(n, "i32") for n in kernel.arg_names}
    options = {"enable_fp_fusion": fused, "num_warps": settings.get("num_warps", 4)}
    settings = {n: value for n, value in settings.items() if n != "num_warps"}
    signature = {n: "constexpr" if n in settings else kind for n, kind in kinds.items()}
    constants = {(kernel.arg_names.index(n),): value for n, value in settings.items()}
    major, minor = capability
    return compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options=options,
    ).asm


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(gpu.LEAST))
@pytest.mark.parametrize("name", KERNELS)
def test_they_compile_for_the_oldest_and_a_newer_card(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for capability in (gpu.LEAST[dtype], (9, 0)):
        assert compiled(name, dtype, capability)["cubin"]


def test_a_scale_is_a_rounded_product_and_a_rounded_sum(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert nf4_triton.APART == {"enable_fp_fusion": False}
    assert "fma" not in compiled("numbers", torch.float32, (8, 0))["ptx"]
    assert "fma" in compiled("numbers", torch.float32, (8, 0), fused=True)["ptx"]

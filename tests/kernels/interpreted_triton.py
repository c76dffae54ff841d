"""Triton's kernels in its interpreter, which test_triton.py runs in a process of its own.

That they are interpreted is settled when Triton is imported, so it cannot be asked for in a process
that other tests share: `TRITON_INTERPRET=1 pytest tests/kernels/interpreted_triton.py`.
"""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

from inlay.bases.nf4 import PackedLinear
from inlay.kernels import codec, gpu
from inlay.kernels import nf4_triton as kernels

KINDS = [(kind, double) for kind in codec.TABLES for double in (False, True)] + [("int8", False)]
FAR = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""The error of a product beside its value: that of rounding it once, or of the sum's order."""


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch):
    """Mend the interpreter, which cuts bfloat16 off, and multiplies its bits for its values."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (float32, bfloat16):
            return cast(self, src, dst_type)
        bits = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view("uint16"), bfloat16)

    def multiplied(self, a, b, *rest):
        a, b = (cast(self, t, float32) if t.dtype.scalar == bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    for name in ("create_fp_trunc", "create_fp_to_fp"):
        monkeypatch.setattr(
            InterpreterBuilder, name, lambda self, src, to, *_: self.cast_impl(src, to)
        )
    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiplied)


def packed_of(shape, kind="nf4", double=True, block=64):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return codec.quantize(weight, kind, block, double)


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("block", codec.BLOCKS)
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_numbers_are_those_of_plain_torch_to_the_bit(kind, double, block, dtype):
    for shape in ((1, 1), (37, 129), (2, 5, 64)):
        packed = packed_of(shape, kind, double, block)
        room = torch.full((math.prod(shape) + 3,), torch.nan, dtype=dtype)
        kernels.dequantize(packed, room[:-3])
        assert torch.equal(room[:-3].view(shape), codec.dequantize(packed, dtype=dtype))
        assert room[-3:].isnan().all()  # nothing is written beyond


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_products_are_those_with_the_numbers(kind, double, block, dtype):
    for outputs, inputs, rows in ((1, 64, 1), (33, 192, 3), (70, 128, 16)):
        packed = packed_of((outputs, inputs), kind, double, block)
        weight = codec.dequantize(packed, dtype=dtype).double()
        x, grad, bias = (
            torch.randn(shape).to(dtype) for shape in ((rows, inputs), (rows, outputs), (outputs,))
        )
        assert kernels.knows(packed, rows)
        for found, wanted in (
            (kernels.linear(x, packed), x.double() @ weight.T),
            (kernels.linear(x, packed, bias), x.double() @ weight.T + bias),
            (kernels.product(grad, packed), grad.double() @ weight),
        ):
            assert (found.dtype, found.shape) == (dtype, wanted.shape)
            far = FAR[dtype]
            torch.testing.assert_close(found.double(), wanted, rtol=far, atol=far)


@pytest.mark.parametrize("inputs", [1, 33, 65, 130])
def test_rows_of_any_length_are_multiplied_in_int8(inputs):
    packed = packed_of((5, inputs), "int8")
    weight, x, grad = codec.dequantize(packed), torch.randn(2, inputs), torch.randn(2, 5)
    torch.testing.assert_close(kernels.linear(x, packed), x @ weight.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.product(grad, packed), grad @ weight, rtol=1e-5, atol=1e-5)


def test_an_input_may_lie_in_memory_as_it_will():
    packed, x = packed_of((8, 64)), torch.randn(64, 3).T
    assert not x.is_contiguous()
    assert torch.equal(kernels.linear(x, packed), kernels.linear(x.contiguous(), packed))
    grad = torch.randn(8, 1).T.expand(3, 8)
    assert torch.equal(kernels.product(grad, packed), kernels.product(grad.contiguous(), packed))


def test_products_that_are_left_to_plain_torch_are_told():
    known = packed_of((4, 128))
    assert [rows for rows in range(40) if kernels.knows(known, rows)] == [*range(1, 17)]
    assert kernels.knows(packed_of((4, 96), block=32), 1)
    assert not kernels.knows(packed_of((4, 96), block=64), 1)  # a tile would end in a row
    assert not kernels.knows(packed_of((4, 65)), 1)
    assert not kernels.knows(packed_of((2, 2, 64)), 1)  # experts, which are no one matrix


def test_a_layer_computes_by_them_forward_and_backward(monkeypatch):
    plain = nn.Linear(128, 24).requires_grad_(False)
    x = torch.randn(2, 3, 128, requires_grad=True)
    grad = torch.randn(2, 3, 24)
    packed = PackedLinear.of(plain)
    wanted = packed(x)
    wanted_grad = torch.autograd.grad(wanted, x, grad)[0]
    done = []

    def note(name):
        def call(*given):
            done.append(name)
            return getattr(kernels, name)(*given)

        return call

    noted = SimpleNamespace(
        knows=kernels.knows, **{n: note(n) for n in ("dequantize", "linear", "product")}
    )
    monkeypatch.setattr(gpu, "triton_for", lambda device, dtype: noted)
    monkeypatch.setattr(codec, "FAST", {"cpu": gpu.dequantize})
    out = packed(x)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out, x, grad)[0]
    torch.testing.assert_close(found, wanted_grad, rtol=1e-5, atol=1e-5)
    assert done == ["linear", "product"]
    many = torch.randn(17, 128, requires_grad=True)
    meant = F.linear(many, codec.dequantize(packed.packed), packed.bias)
    torch.testing.assert_close(packed(many), meant)
    assert done[2:] == ["dequantize", "dequantize"]


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_a_first_try_tells_what_is_wrong(dtype):
    cpu = torch.device("cpu")
    assert gpu.wrong(kernels, cpu, dtype) is None

    def but(**changed):
        names = ("dequantize", "linear", "product")
        return SimpleNamespace(**{n: getattr(kernels, n) for n in names} | changed)

    def off(name):
        return lambda *given: getattr(kernels, name)(*given) * 1.05

    skipped = but(dequantize=lambda packed, out: out.zero_())
    assert gpu.wrong(skipped, cpu, dtype) == "other numbers from nf4"
    assert gpu.wrong(but(linear=off("linear")), cpu, dtype) == "another x W^T from nf4"
    assert gpu.wrong(but(product=off("product")), cpu, dtype) == "another dy W from nf4"


@pytest.fixture
def card(monkeypatch):
    """As if there were a GPU; asked of it is only what it is."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(gpu, "wrong", lambda kernels, device, dtype: None)
    gpu.triton_for.cache_clear()
    yield torch.device("cuda", 0)
    gpu.triton_for.cache_clear()


def test_where_triton_computes(card, monkeypatch):
    assert gpu.triton_for(card, torch.bfloat16) is kernels
    assert gpu.triton_for(card, torch.float64) is None
    assert gpu.triton_for(torch.device("cpu"), torch.bfloat16) is None
    for name, changed in (
        ("torch.cuda.get_device_capability", lambda device: (7, 5)),
        ("torch.version.hip", "7.0"),
        ("importlib.util.find_spec", lambda name: None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, changed)
            gpu.triton_for.cache_clear()
            assert gpu.triton_for(card, torch.bfloat16) is None
    monkeypatch.setenv("INLAY_NATIVE", "0")
    gpu.triton_for.cache_clear()
    assert gpu.triton_for(card, torch.bfloat16) is None


@pytest.mark.parametrize("reason", ["another dy W from nf4", RuntimeError("Failed to find CC\n!")])
def test_a_first_try_that_fails_is_told_once_and_plain_torch_computes(card, reason, monkeypatch):
    def wrong(kernels, device, dtype):
        if isinstance(reason, Exception):
            raise reason
        return reason

    monkeypatch.setattr(gpu, "wrong", wrong)
    told = "another dy W" if isinstance(reason, str) else r"\(RuntimeError: Failed to find CC\)"
    with pytest.warns(UserWarning, match=told):
        assert gpu.triton_for(card, torch.bfloat16) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.triton_for(card, torch.bfloat16) is None

"""Compiled code beside plain torch: the same numbers, to the bit."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from inlay.kernels import native, nf4

needs_compiler = pytest.mark.skipif(not nf4.available(), reason="no C compiler on this machine")


def eager(codes, absmax, table, n, block, dtype):
    both = torch.stack((codes >> 4, codes & 15), -1).flatten()[:n].long()
    return (table[both] * absmax.repeat_interleave(block)[:n]).to(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", list(nf4.KINDS))
@pytest.mark.parametrize("block", [64, 128, 4096])
@pytest.mark.parametrize("n", [1, 2, 7, 63, 64, 65, 1001, 300_000])
def test_numbers_are_those_of_plain_torch(n, block, dtype):
    generator = torch.Generator().manual_seed(n + block)
    codes = torch.randint(256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    blocks = -(-n // block)
    table = torch.randn(16, generator=generator).sort().values
    absmax = torch.rand(blocks, generator=generator) * 3
    out = torch.full((n,), torch.nan, dtype=dtype)
    nf4.dequantize(codes, absmax, table, out, block=block)
    assert torch.equal(out, eager(codes, absmax, table, n, block, dtype))

    eight = torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator)
    map_, outer = torch.randn(256, generator=generator), torch.rand(-(-blocks // 256)) + 0.5
    absmax = map_[eight.long()] * outer.repeat_interleave(256)[:blocks] + 0.0625
    nf4.dequantize(codes, eight, table, out, block=block, nested=(map_, outer, 256, 0.0625))
    assert torch.equal(out, eager(codes, absmax, table, n, block, dtype))


@needs_compiler
def test_any_number_of_threads_computes_the_same(monkeypatch):
    codes = torch.randint(256, (512 * 1024,), dtype=torch.uint8)
    absmax, table = torch.rand(codes.numel() * 2 // 64), torch.randn(16)
    found = []
    for threads in (1, 2, 3, 200):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = torch.empty(codes.numel() * 2, dtype=torch.bfloat16)
        found.append(nf4.dequantize(codes, absmax, table, out, block=64))
    assert all(torch.equal(out, found[0]) for out in found)


@needs_compiler
def test_a_compiled_library_is_kept_for_the_user_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library("nf4") is not None
        (made,) = (tmp_path / "inlay" / "kernels").iterdir()
        mode = stat.S_IMODE(made.stat().st_mode)
        assert not mode & 0o022
        before = made.stat().st_mtime_ns
        native.library.cache_clear()
        assert native.library("nf4") is not None
        assert made.stat().st_mtime_ns == before  # compiled once
        native.library.cache_clear()
        os.chmod(made.parent, 0o777)  # what others can write to is not run
        assert native.library("nf4") is None
    finally:
        native.library.cache_clear()


@needs_compiler
def test_what_is_not_for_this_processor_is_not_there(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(native, "HERE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fits.c").write_text("int inlay_sum(int a, int b) { return a + b; }\n")
    (tmp_path / "unfit.c").write_text("const int inlay_unfit = 1;\n")
    native.library.cache_clear()
    try:
        assert native.library("fits").inlay_sum(2, 3) == 5
        assert native.library("unfit") is None
    finally:
        native.library.cache_clear()


def test_without_a_compiler_there_is_none_and_no_error(monkeypatch):
    monkeypatch.setenv("INLAY_NATIVE", "0")
    native.library.cache_clear()
    nf4._function.cache_clear()
    try:
        assert not nf4.available()
        codes, one, table, out = (
            torch.zeros(1).byte(),
            torch.zeros(1),
            torch.zeros(16),
            torch.empty(2),
        )
        with pytest.raises(RuntimeError, match="the eager twin"):
            nf4.dequantize(codes, one, table, out, block=64)
    finally:
        native.library.cache_clear()
        nf4._function.cache_clear()

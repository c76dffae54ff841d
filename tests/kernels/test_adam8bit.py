"""AdamW over moments in 8 bits: maps and codes, and the compiled step beside its twin."""

from __future__ import annotations

import pytest
import torch

from inlay.kernels import adam8bit as kernel
from inlay.kernels.adam8bit import BLOCK, Piece, Rule, pack, unpack, unsigned_map
from inlay.kernels.codec import dynamic_map

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not kernel.available(), reason="no C compiler here")


def empty(size, dtype):
    """Return weights, and moments of 0."""
    weights = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    codes, absmax = torch.zeros(size, dtype=torch.uint8), torch.zeros(-(-size // BLOCK))
    return [weights, codes, codes.clone(), absmax, absmax.clone()]


def gradients(size, dtype, count):
    """Yield gradients of many magnitudes, one of them with blocks of zeros."""
    generator = torch.Generator().manual_seed(size + 1)
    for i in range(count):
        drawn = torch.randn(size, generator=generator) ** 3 * 10.0 ** (i % 5 - 3)
        drawn[: size // 3 if i == 2 else 0] = 0
        yield drawn.to(dtype)


@pytest.mark.parametrize("signed", [True, False])
def test_maps_and_codes_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=signed)
    ours = dynamic_map(CPU) if signed else unsigned_map(CPU)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    values = torch.randn(4096, generator=torch.Generator().manual_seed(3))
    values = values if signed else values**2
    codes, absmax = torch.empty(4096, dtype=torch.uint8), torch.empty(16)
    pack(values, codes, absmax, signs=signed)
    packed, state = functional.quantize_blockwise(values, code=theirs, blocksize=BLOCK)
    torch.testing.assert_close(absmax, state.absmax, rtol=0, atol=0)
    scaled = values.view(-1, BLOCK) / absmax[:, None]
    exact = torch.bucketize(scaled.view(-1), (ours[:-1] + ours[1:]) / 2).to(torch.uint8)
    exact = exact if signed else exact.clamp(min=1)
    torch.testing.assert_close(codes, exact, rtol=0, atol=0)
    theirs = functional.dequantize_blockwise(packed, state)
    error = (unpack(codes, absmax, ours) - values).abs()
    # theirs rounds to 65,536 steps first, ours does not: never further off, but by that rounding
    assert (error <= (theirs - values).abs() + absmax.repeat_interleave(BLOCK) * 1e-4).all()


def test_what_is_above_zero_does_not_become_zero_in_the_second_moment():
    values = torch.zeros(300)
    values[:3] = torch.tensor([1.0, 1e-12, 0.0])
    codes, absmax = torch.empty(300, dtype=torch.uint8), torch.empty(2)
    pack(values, codes, absmax, signs=False)
    found = unpack(codes, absmax, unsigned_map(CPU))
    assert found[0] == 1
    assert found[1] > 0
    assert not found[2:].any()


@needs_compiler
@pytest.mark.parametrize("dtype", kernel.KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 15, 255, 256, 257, 70_001, (1 << 18) + 300])
def test_compiled_steps_are_those_of_the_twin_to_the_bit(size, decay, dtype):
    ours, twin = empty(size, dtype), empty(size, dtype)
    for i, grad in enumerate(gradients(size, dtype, 6), start=1):
        rule = Rule.of(0.01, (0.9, 0.999), 1e-8, decay, i)
        kernel.step([Piece(ours[0], grad, *ours[1:], rule)])
        kernel.step_plainly(Piece(twin[0], grad, *twin[1:], rule))
        assert all(map(torch.equal, ours, twin))
    assert ours[1].unique().numel() > min(size, 50) // 2
    assert not torch.equal(ours[0], empty(size, dtype)[0])


@needs_compiler
def test_many_tensors_at_once_move_as_each_alone_whatever_the_threads(monkeypatch):
    sizes = (4096, 5003, 1, 300_000, 256)
    rule = Rule.of(0.01, (0.9, 0.999), 1e-8, 0.1, 1)
    rules = [rule, Rule.of(0.02, (0.8, 0.9), 1e-6, 0.0, 7), rule, rule, rule]
    kinds = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    found = []
    for threads in (1, 2, 3, 200):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        states = [empty(size, kind) for size, kind in zip(sizes, kinds, strict=True)]
        for step in range(2):
            grads = [list(gradients(len(s[0]), s[0].dtype, 2))[step] for s in states]
            parts = zip(states, grads, rules, strict=True)
            kernel.step([Piece(s[0], grad, *s[1:], rule) for s, grad, rule in parts])
        found.append([tensor for state in states for tensor in state])
    alone = [empty(size, kind) for size, kind in zip(sizes, kinds, strict=True)]
    for state, rule in zip(alone, rules, strict=True):
        for grad in gradients(len(state[0]), state[0].dtype, 2):
            kernel.step_plainly(Piece(state[0], grad, *state[1:], rule))
    found.append([tensor for state in alone for tensor in state])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@needs_compiler
def test_what_is_not_a_number_spoils_its_block_alone_in_both():
    states = [empty(600, torch.float32) for _ in range(2)]
    grad = next(iter(gradients(600, torch.float32, 1)))
    grad[300] = torch.nan
    for state, step in zip(states, (lambda p: kernel.step([p]), kernel.step_plainly), strict=True):
        step(Piece(state[0], grad, *state[1:], Rule.of(0.01, (0.9, 0.999), 1e-8, 0.0, 1)))
    for state in states:
        assert state[3].isnan().tolist() == [False, True, False]
        assert state[0].isnan().nonzero().tolist() == [[300]]


def test_other_dtypes_are_moved_by_the_twin():
    state = empty(300, torch.float16)
    grad = next(iter(gradients(300, torch.float16, 1)))
    before = state[0].clone()
    rule = Rule.of(0.01, (0.9, 0.999), 1e-8, 0.0, 1)
    kernel.step([Piece(state[0], grad, *state[1:], rule)])
    # the first step goes lr into the gradient's direction, whatever its length
    moved = (state[0] - before).float()[grad.abs() > 1e-3]
    torch.testing.assert_close(
        moved, -0.01 * grad[grad.abs() > 1e-3].sign().float(), rtol=0.1, atol=1e-3
    )

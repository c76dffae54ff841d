"""A step of AdamW over moments in 8 bits: block-wise dynamic quantization (arXiv:2110.02861).

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = keep w - rate (m / (root sqrt(v) + eps))

A moment of n values is codes uint8 [n] and the largest magnitude of each 256 of them, absmax
float32 [ceil(n / 256)]: value = map[code] * absmax. The map of m has signs; that of v has a bit
more of fraction in their place. On the CPU `adam8bit.c` does all of it in one pass; elsewhere, and
where nothing compiles, its eager twin does, to the same bit, a piece at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.kernels.codec import dynamic_map
from inlay.kernels.native import library

BLOCK = 256
"""Values that share an absmax."""
PIECE = 1 << 18
"""Values the twin works on at a time, a megabyte of float32 a tensor; whole blocks."""
KINDS = (torch.float32, torch.bfloat16)
"""Dtypes of weights and gradients that are compiled for; half precision is the second."""


class Rule(NamedTuple):
    """The numbers of one step: w = keep w - rate (m / (root sqrt(v) + eps))."""

    b1: float
    b2: float
    eps: float
    keep: float
    rate: float
    root: float

    @classmethod
    def of(
        cls, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int
    ) -> Rule:
        """Return those of the step number `step`, from 1, with the moments' bias put right."""
        b1, b2 = betas
        keep, rate, root = 1 - lr * weight_decay, lr / (1 - b1**step), (1 - b2**step) ** -0.5
        return cls(b1, b2, eps, keep, rate, root)


class Piece(NamedTuple):
    """Values that a step moves, and their moments: all contiguous and of one device.

    weights, grads of n values, of one dtype; first, second uint8 [n], the codes of m and v;
    first_max, second_max float32 [ceil(n / 256)].
    """

    weights: Tensor
    grads: Tensor
    first: Tensor
    second: Tensor
    first_max: Tensor
    second_max: Tensor
    rule: Rule


def step(pieces: Sequence[Piece]) -> None:
    """Move the weights and moments of every piece, in place."""
    compiled = []
    for piece in pieces:
        if _is_compiled(piece):
            compiled.append(piece)
        else:
            step_plainly(piece)
    if compiled:
        _step_compiled(compiled)


def available() -> bool:
    """Return whether this machine can compile it."""
    return _function() is not None


def step_plainly(piece: Piece) -> None:
    """Move one piece by plain torch: the twin."""
    device = piece.weights.device
    signed, unsigned = dynamic_map(device), unsigned_map(device)
    weights, grads = piece.weights.view(-1), piece.grads.view(-1)
    for start in range(0, len(weights), PIECE):
        part = slice(start, start + PIECE)
        blocks = slice(start // BLOCK, (start + PIECE) // BLOCK)
        first, first_max = piece.first[part], piece.first_max[blocks]
        second, second_max = piece.second[part], piece.second_max[blocks]
        mean, square = unpack(first, first_max, signed), unpack(second, second_max, unsigned)
        move(weights[part], grads[part], mean, square, piece.rule)
        pack(mean, first, first_max, signs=True)
        pack(square, second, second_max, signs=False)


def move(weights: Tensor, grads: Tensor, mean: Tensor, square: Tensor, rule: Rule) -> None:
    """Move weights, mean and square in place, all of one shape, the last two in float32."""
    exact = grads.float()
    # products and sums apart, each rounded: fused ones would be rounded otherwise than elsewhere
    mean.mul_(rule.b1).add_(exact * (1 - rule.b1))
    square.mul_(rule.b2).add_((exact * exact).mul_(1 - rule.b2))
    below = _root(square).mul_(rule.root).add_(rule.eps)
    moved = weights.float() * rule.keep
    weights.copy_(moved.sub_((mean / below).mul_(rule.rate)))


def _root(x: Tensor) -> Tensor:
    # on the CPU torch's root in float32 is a bit off here and there; from float64 it never is
    return x.double().sqrt().float() if x.device.type == "cpu" else x.sqrt()


@cache
def unsigned_map(device: torch.device) -> Tensor:
    """Return the 256 values [256] from 0 to 1 of the second moment's codes, in rising order.

    As `dynamic_map`, with the bit of the sign given to the fraction (the paper's section 2.2).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + 1) + 1)
        values += (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return torch.tensor(sorted(values), device=device)


def pack(values: Tensor, codes: Tensor, absmax: Tensor, *, signs: bool) -> None:
    """Write float32 values [n] as codes uint8 [n] and absmax [ceil(n / 256)], the nearest level.

    signs: whether they are those of `dynamic_map`, or of `unsigned_map`. Of the latter what is
    above 0 never becomes 0: as a second moment it would make a step of m / eps.
    """
    padded = torch.nn.functional.pad(values, (0, len(absmax) * BLOCK - len(values)))
    blocks = padded.view(-1, BLOCK)
    torch.amax(blocks.abs(), 1, out=absmax)
    # a block of zeros stays one, whatever it is divided by
    scaled = (blocks / absmax.clamp(min=1e-38)[:, None]).view(-1)[: len(values)]
    below, middle = _cells(signs, values.device)
    cell = (scaled.view(torch.int32) >> 16).add_(1 << 15)
    torch.index_select(below, 0, cell, out=codes)
    codes.add_(scaled > middle.index_select(0, cell))
    if not signs:
        codes.clamp_(min=1).mul_(values > 0)


def unpack(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """Return the float32 values [n] of codes uint8 [n] and absmax [ceil(n / 256)]."""
    values = levels.index_select(0, codes.int())
    whole = len(values) // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK, None])
    values[whole:].mul_(absmax[-1])
    return values


@cache
def _cells(signs: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many middles between levels lie before each cell [65536], and the next [65536].

    A cell is the numbers whose float32 begins with the same 16 bits: too few for two middles, so
    that the place in it decides. As `torch.bucketize`, without its search.
    """
    levels = dynamic_map(device) if signs else unsigned_map(device)
    middles = (levels[:-1] + levels[1:]) / 2
    start = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=device) << 16
    # of negative numbers the least has the largest bits
    least = torch.where(start < 0, start | 0xFFFF, start).view(torch.float32)
    below = torch.bucketize(least, middles)
    ends = torch.cat([middles, middles.new_full((1,), torch.inf)])
    return below.to(torch.uint8), ends[below]


@cache
def _words(signs: bool) -> Tensor:
    """Return `_cells` in a word each, int32 [65536], by the 16 bits that a float32 begins with.

    The upper half is the count; the lower the 16 bits that follow in the middle, counted from the
    least of the cell, or 65535, which none is above, where no middle is in it.
    """
    below, middle = (found.roll(1 << 15) for found in _cells(signs, torch.device("cpu")))
    cell = torch.arange(1 << 16, dtype=torch.int32)
    bits = middle.view(torch.int32)
    rest = torch.where(bits < 0, ~bits, bits) & 0xFFFF
    inside = (bits >> 16 & 0xFFFF).eq(cell) & middle.isfinite()
    return below.int() << 16 | torch.where(inside, rest, 0xFFFF)


@cache
def _function() -> Any:
    found = library("adam8bit")
    if found is None:
        return None
    function = found.inlay_adam8bit
    pointer = ctypes.c_void_p
    function.argtypes = [*[pointer] * 3, ctypes.c_int64, *[pointer] * 4, ctypes.c_int]
    function.restype = None
    return function


def _is_compiled(piece: Piece) -> bool:
    w, g = piece.weights, piece.grads
    return w.device.type == "cpu" and w.dtype == g.dtype and w.dtype in KINDS and available()


def _step_compiled(pieces: Sequence[Piece]) -> None:
    places, rules, blocks = [], [], []
    for w, g, *moments, r in pieces:
        n = w.numel()
        assert w.is_contiguous()
        assert g.is_contiguous()
        assert g.numel() == n == moments[0].numel() == moments[1].numel()
        pointers = [tensor.data_ptr() for tensor in (w, g, *moments)]
        places.append((*pointers, n, w.dtype == torch.bfloat16))
        rules.append((r.b1, 1 - r.b1, r.b2, 1 - r.b2, r.eps, r.keep, r.rate, r.root))
        blocks.append(-(-n // BLOCK))
    cpu = torch.device("cpu")
    given = (torch.tensor(places), torch.tensor(rules), torch.tensor(list(accumulate(blocks))))
    tables = (dynamic_map(cpu), unsigned_map(cpu), _words(True), _words(False))
    _function()(
        *(table.data_ptr() for table in given),
        len(pieces),
        *(table.data_ptr() for table in tables),
        torch.get_num_threads(),
    )

"""Attention blocks whose rotation (RoPE) is part of the attention: q, k, v, both, o in four steps.

A module is taken if it has the parts of such a block (linears that make q, k and v, and one back;
norms of a head) and if, fed what the model feeds it, the fast form gives the same. What it computes
without packed rows, or with past keys, it computes by its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from inlay.kernels import attention as kernel
from inlay.kernels.attention import Rotation
from inlay.model.attention import HARMLESS, Packed, in_autocast, only_scores
from inlay.model.blocks import Form, below, placed, proved, same

TOLD = {"hidden_states", "attention_mask", "position_embeddings", "past_key_values"}
"""What a block is given by name beside HARMLESS."""


@contextmanager
def rotating_attention(model: nn.Module, run: Callable[[], Any]) -> Iterator[list[nn.Module]]:
    """Let attention of packed rows rotate its queries and keys itself, for a `with` block.

    run: makes one forward pass of the model, without gradient and dropout, its attention packed.
    Yields the modules that do. Those that were given a forward of their own are left alone.
    """
    with placed(proved(model, run, _forms)) as modules:
        yield modules


@dataclass(frozen=True)
class Parts:
    """Which children of a block make what; q alone makes q, k and v where the others are ""."""

    q: str
    k: str
    v: str
    o: str
    q_norm: str = ""
    k_norm: str = ""


class _Listening(Packed):
    """Rows that keep what attention over them is given."""

    heard: tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]] | None = None

    def hear(self, made: tuple[Tensor, Tensor, Tensor], told: dict[str, Any]) -> None:
        self.heard = made, told


def _forms(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Form]:
    """Return what `module` may compute, judged by its parts and by what it tells its attention."""
    mask, rotation = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
    past = kwargs.get("past_key_values") is not None  # which a second call would add to
    if args or past or not isinstance(mask, Packed) or not isinstance(rotation, tuple):
        return []
    heard = _heard(module, kwargs, mask)
    if heard is None:
        return []
    made, told = heard
    scale = told.get("scaling")
    if not isinstance(scale, float) or not only_scores(told):
        return []
    turning = mask.rotation(rotation)
    x, width = kwargs["hidden_states"], turning[0].shape[1]
    return [
        Rotating(module, _attend, parts, scale, told.get("softcap"))
        for parts in _parts(module, width)
        if _turned(module, x, parts, turning, made)
    ]


def _heard(
    module: nn.Module, kwargs: dict[str, Any], mask: Packed
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]] | None:
    """Return what `module` gives its attention in training; None where it gives it nothing."""
    listening = _Listening(mask.rows, mask.window, mask.mask)
    before, module.training = module.training, True  # its children stay as they are
    try:
        type(module).forward(module, **{**kwargs, "attention_mask": listening})
    finally:
        module.training = before
    return listening.heard


def _turned(
    module: nn.Module, x: Tensor, parts: Parts, turning: Rotation, wanted: tuple[Tensor, ...]
) -> bool:
    """Return whether these parts and this rotation make the q, k and v [B, heads, T, D] wanted.

    The block's output would tell little: of a model that was not trained each token sees its row
    about evenly, however it is rotated.
    """
    q, k, v = _made(module, x, parts, turning[0].shape[1])
    made = kernel.rotated(q, turning), kernel.rotated(k, turning), v
    known = (t.transpose(1, 2).flatten(0, 1) for t in wanted)
    return all(same(a.to(b.dtype), b) for a, b in zip(made, known, strict=True))


def _parts(module: nn.Module, width: int) -> list[Parts]:
    """Return how the children of `module` may make attention with heads of `width` numbers."""
    children = dict(module.named_children())
    sizes = {
        n: (one.out_features, one.in_features)
        for n, m in children.items()
        if isinstance(one := below(m), nn.Linear)
    }
    others = [n for n in children if n not in sizes]
    if width % 2 or len(others) not in (0, 2) or any(_width(children[n]) != width for n in others):
        return []
    norms = list(permutations(others)) if others else [("", "")]
    found: list[Parts] = []
    if len(sizes) == 4:
        found = [
            Parts(q, k, v, o)
            for q, k, v, o in permutations(sizes)
            if sizes[q] == sizes[o][::-1] and sizes[k] == sizes[v] and sizes[q][1] == sizes[k][1]
        ]
    elif len(sizes) == 2:
        found = [
            Parts(q, "", "", o)
            for q, o in permutations(sizes)
            if sizes[q][1] == sizes[o][0] and sizes[q][0] > sizes[o][1]
        ]
    fits = [p for p in found if all(sizes[n][0] % width == 0 for n in (p.q, p.k or p.q))]
    return [Parts(p.q, p.k, p.v, p.o, *pair) for p in fits for pair in norms]


def _width(module: nn.Module) -> int:
    """Return the numbers that a norm takes; 0 where it is none."""
    parameters = list(module.parameters())
    return len(parameters[0]) if len(parameters) == 1 and parameters[0].ndim == 1 else 0


class Rotating(Form):
    """The fast form of an attention block, which is called with everything by name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block computes; of anything but packed rows, by the block's own."""
        known = not args and all(name in TOLD or name in HARMLESS for name in kwargs)
        mask, rotation = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        able = kwargs.get("past_key_values") is None and not torch.compiler.is_compiling()
        if known and able and isinstance(mask, Packed) and rotation is not None:
            x = kwargs.get("hidden_states")
            if isinstance(x, Tensor) and x.shape[0] * x.shape[1] == mask.rows.bounds[-1]:
                return self.compute(self.module, x, mask, rotation, *self.given), None
        return type(self.module).forward(self.module, *args, **kwargs)


def _attend(
    module: Any,
    x: Tensor,
    mask: Packed,
    rotation: Rotation,
    parts: Parts,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Return what the block makes of x [B, T, H]."""
    turning = mask.rotation(rotation)
    q, k, v = in_autocast(*_made(module, x, parts, turning[0].shape[1]))
    out = kernel.attention(
        q, k, v, mask.rows, scale=scale, window=mask.window, cap=cap, rotation=turning
    )
    made: Tensor = module._modules[parts.o](out.flatten(1).view(*x.shape[:-1], -1))
    return made


def _made(module: Any, x: Tensor, parts: Parts, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v [B T, heads, D] of x [B, T, H], not rotated."""
    children = module._modules
    q, *rest = (
        children[name](x).flatten(0, 1).unflatten(-1, (-1, width))
        for name in (parts.q, parts.k, parts.v)
        if name
    )
    if not rest:
        heads = below(children[parts.o]).in_features // width
        q, *rest = q.split([heads, *[(q.shape[1] - heads) // 2] * 2], 1)
    k, v = rest
    if parts.q_norm:
        q, k = children[parts.q_norm](q), children[parts.k_norm](k)
    return q, k, v

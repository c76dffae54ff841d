"""The head of a model by itself: what it is fed, and what is made of its logits.

    logits = cap tanh(scale (h W^T + b) / cap)

Where a model soft-caps (Gemma 2) or scales (Cohere, Granite) its logits, a number of its
configuration says by how much, under one of many names; which, and whether nothing else is done to
them, is tried once: the head is fed random states, small to large, and what the model returns must
be what the formula gives.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRIED = 8
"""Tokens on which a head is tried."""
SIZES = (1.0, 10.0, 100.0, 1000.0)
"""Sizes of the logits that it is tried with, in turn: a cap shows in large ones alone."""
WORDS = ("logit", "cap", "multiplier")
"""What the configuration's names have in common for numbers that change logits."""


@dataclass(frozen=True)
class Output:
    """A head W [V, H], b [V], the model that it stands in, and what that makes of its logits."""

    head: nn.Linear
    scale: float
    cap: float | None

    def states(self, model: nn.Module, call: Mapping[str, Any]) -> Tensor:
        """Return what the head is fed [B, S, H] in model(**call), without any logits.

        It is in the dtype that the head would compute in.
        """
        with _fed(self.head, lambda states: states[:, :0]) as seen:
            model(**call)
        (states,) = seen
        kind = states.device.type
        return states.to(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        )


def find_output(model: nn.Module, call: Mapping[str, Any]) -> Output | None:
    """Return the head of `model`; None where it has none, or one that does more than the formula.

    call: arguments of the model with input_ids [B, S], of which it is tried on a few, the first
    time. A head that holds an adapter, is packed, sharded or watched by hooks is no plain one.
    """
    head = _head_of(model)
    if head is None:
        return None
    if head not in _FOUND:
        _FOUND[head] = _try(model, head, call)
    form = _FOUND[head]
    return None if form is None else Output(head, *form)


def shortened(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of one row of a few tokens, for what is to be tried."""
    rows, length = call["input_ids"].shape

    def short(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape[:2] == (rows, length):
            return value[:1, :TRIED]
        by_row = isinstance(value, Tensor | list | tuple) and len(value) == rows
        return value[:1] if by_row else value

    return {name: short(value) for name, value in call.items()}


def takes_positions(model: nn.Module) -> bool:
    """Return whether a model can be asked for the logits of some positions alone."""
    return "logits_to_keep" in inspect.signature(base_of(model).forward).parameters


def base_of(model: nn.Module) -> nn.Module:
    """Return the model that a PeftModel hands its arguments on to, or `model` itself."""
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


_Form = tuple[float, float | None]
_FOUND: weakref.WeakKeyDictionary[nn.Module, _Form | None] = weakref.WeakKeyDictionary()
"""Head -> scale and cap; None where the formula does not hold."""


def _head_of(model: nn.Module) -> nn.Linear | None:
    getter = getattr(base_of(model), "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    # a subclass, a replaced forward or a hook may compute something else
    plain = (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and type(head.weight.data) is Tensor
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
    )
    return head if plain else None


@torch.no_grad()
def _try(model: nn.Module, head: nn.Linear, call: Mapping[str, Any]) -> _Form | None:
    ids, short = call["input_ids"], shortened(call)
    # what is drawn on the way, such as dropout, is not drawn from the run
    with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
        try:
            with _fed(head, lambda states: _random(head, states)) as seen:
                logits = model(**short).logits
            with _fed(head, lambda states: states[:, :0]) as unseen:
                model(**short)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            return None
        if len(seen) != 1 or len(unseen) != 1 or seen[0].ndim != 3:
            return None
        raw = F.linear(_random(head, seen[0]), head.weight, head.bias)
    if not isinstance(logits, Tensor) or logits.shape != raw.shape:
        return None
    return _fitting(raw, logits, _numbers(base_of(model)))


def _fitting(raw: Tensor, logits: Tensor, numbers: list[float]) -> _Form | None:
    """Return the scale and the cap that make `logits` [1, S, V] of what the head gives, or None."""
    enough = 1e-4 if raw.dtype == torch.float32 == logits.dtype else 2e-2
    raw, logits = raw.float(), logits.float()
    size = logits.abs().amax(-1, keepdim=True)
    best: tuple[float, _Form] | None = None
    for scale in (1.0, *numbers, *(1 / number for number in numbers)):
        for cap in (None, *(number for number in numbers if number > 0)):
            made = raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)
            apart = float(((made - logits).abs() / size).max())
            if apart < (enough if best is None else best[0]):  # never of what is not a number
                best = apart, (scale, cap)
    return None if best is None else best[1]


def _numbers(model: nn.Module) -> list[float]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    held = {**vars(config), **vars(text)} if config is not None else {}
    found = (
        float(value)
        for name, value in held.items()
        if type(value) in (int, float) and any(word in name for word in WORDS)
    )
    return [number for number in dict.fromkeys(found) if number not in (0.0, 1.0)]


def _random(head: nn.Linear, states: Tensor) -> Tensor:
    """Return random states like `states` [B, S, H], the same each time; logits of SIZES."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(states.shape, generator=generator).to(states.device)
    sizes = torch.tensor(SIZES, device=states.device).repeat(-(-states.shape[1] // len(SIZES)))
    # the logits of normal states are as large as the rows of the weight are long
    length = head.weight.detach()[:1024].float().norm(dim=1).mean()
    return (drawn * sizes[: states.shape[1], None] / length).to(states.dtype)


@contextmanager
def _fed(head: nn.Module, instead: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Note what the head is fed for a `with` block, and feed it something else."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (instead(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()

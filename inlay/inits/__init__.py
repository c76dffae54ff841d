"""The starts of a LoRA that are computed, one short file each: the file name is the registry.

A file gives `start(weight [O, I], rank, scale, ...) -> (B [O, R], A [R, I])` and says in
`FROM_THE_BASE` whether scale * B A is a part of the weight. If so, what is left of the weight
(W - scale * B A) is what the update is added to, and the layer begins as it was. `FROM_DATA`: it
needs to know what the model does with data; EVA's file has parts, for its layers share a budget.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.core.errors import UserError, nearest

_NITER = "_niter_"


class Start(NamedTuple):
    """B [O, R] and A [R, I], and whether scale * B A is to be taken off the base."""

    b: Tensor
    a: Tensor
    from_the_base: bool


@cache
def names() -> tuple[str, ...]:
    """Return every start's name."""
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    )


@cache
def from_data(init: object) -> bool:
    """Return whether `init` is the name of a start that needs data."""
    known = isinstance(init, str) and init in names()
    return known and getattr(_module(str(init)), "FROM_DATA", False)


def start(init: str, weight: Tensor, rank: int, scale: float, **found: Any) -> Start:
    """Return the factors that the start called `init` has on this weight [O, I].

    found: what more its `start` takes. UserError for a name that is none, and for ranks and scales
    it has no factors for.
    """
    name, niter, turns = init.partition(_NITER)
    if name not in names() or (niter and not turns.isdigit()):
        raise UserError(f"{init!r} is no start: {', '.join(names())}.{nearest(name, names())}")
    if rank > min(weight.shape):
        raise UserError(
            f"init_lora_weights={init!r} has at most rank {min(weight.shape)} on a weight "
            f"{list(weight.shape)}, not {rank}: lower r"
        )
    module = _module(name)
    more = {"niter": int(turns)} if niter else found
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    b, a = module.start(wide, rank, scale, **more)
    return Start(b, a, module.FROM_THE_BASE)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")

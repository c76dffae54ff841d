"""What any change of weights is as a LoRA: another method's adapter, or a model tuned in full.

The update D = W' - W [O, I] of a site becomes B A of rank R, the nearest there is; what that leaves
out is |D - B A| / |D| (Frobenius), and over all sites the same of all their entries together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn

from inlay.bases import view
from inlay.core.adapter import Adapter, Delta, Reweight
from inlay.core.base import Base
from inlay.core.beside import Bias, Copy
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.core.numbers import check_whole
from inlay.methods.lora import Lora, LoraConfig
from inlay.model import targets
from inlay.model.lowrank import Spectrum, of_matrix, of_product, relative, set_lora
from inlay.model.roster import Roster


@dataclass(frozen=True)
class Approximation:
    """How near a LoRA comes to the change it stands for."""

    total: float
    """Norm of all that is left out, relative to the whole change; 0 is exact."""
    errors: dict[str, float]
    """The same of each site, by module path."""
    ranks: dict[str, int]
    """The rank that each site was given."""
    left_out: dict[str, float] = field(default_factory=dict)
    """Changed parameters that no LoRA was set on, each with its share of the whole change."""

    def __str__(self) -> str:
        """Return the figures on a line or two."""
        worst = max(self.errors, key=lambda path: self.errors[path])
        told = (
            f"{len(self.errors)} sites of rank {min(self.ranks.values())} to "
            f"{max(self.ranks.values())}; relative error {self.total:.2%}, at most "
            f"{self.errors[worst]:.2%} ({worst})"
        )
        if self.left_out:
            told += f"; {len(self.left_out)} changed parameters are in no site"
        return told


@torch.no_grad()
def convert(roster: Roster, name: str, new: str, rank: int | float) -> Approximation:
    """Set a LoRA called `new` into the model that stands for adapter `name`; say how near it is.

    rank: a whole number for every site; or above 0 and up to 1 as a float, the share of each
    update's squares to keep. A site's update may have less rank than asked: then it gets its own.
    UserError for what has no place in a LoRA: trained biases, norms, and what no weight can say.
    """
    roster.check(name)
    old = roster.configs[name]
    roster.check_new(new, LoraConfig())
    _check_rank(rank)
    made = _Made(rank)
    copies = {}
    for path, host, adapter in roster.adapters(name):
        if isinstance(adapter, Copy):
            copies[path] = adapter
        else:
            made.add(path, _spectrum(name, path, host.base, adapter))
    if not made.factors:
        raise UserError(f"adapter {name!r} adapts no layer, so there is nothing to convert")
    set_lora(
        roster,
        new,
        made.factors,
        copies=copies,
        trainable=name in roster.trainable,
        modules_to_save=old.modules_to_save if copies else None,
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
        revision=old.revision,
        inference_mode=old.inference_mode,
    )
    return made.result({})


@torch.no_grad()
def extract(
    roster: Roster,
    tuned: nn.Module,
    name: str,
    rank: int | float,
    target_modules: Sequence[str] | str = targets.ALL_LINEAR,
) -> Approximation:
    """Set a LoRA called `name` into the model that makes it nearly `tuned`; say how near.

    tuned: a plain model of the same architecture. A layer that tuning left alone gets none.
    target_modules: the layers to put it on. What else differs (norms, biases, embeddings) is in
    `left_out`, and counts in the total. UserError where the two do not fit, or do not differ.
    """
    _check_rank(rank)
    chosen = given if isinstance(given := target_modules, str) else list(given)
    config = LoraConfig(target_modules=chosen)
    roster.check_new(name, config)
    pairs = _pairs(roster.model, tuned)
    theirs = dict(targets.modules(tuned))
    ours = dict(targets.modules(roster.model))
    made = _Made(rank)
    taken = set()
    for path in targets.resolve(roster.model, config).adapted:
        base, other = view(targets.plain(ours[path])), view(theirs[path])
        if base.kind not in Lora.on:
            raise UserError(
                f"{path!r} is a {type(base.module).__name__}, to which no LoRA can be set: leave "
                "it out of target_modules"
            )
        wide = torch.promote_types(base.dtype, torch.float32)
        delta = other.weight().to(base.device, wide) - base.weight().to(wide)
        taken.add((id(base.module.weight), id(other.module.weight)))
        if bool(delta.any()):
            made.add(path, of_matrix(delta))
    left: dict[str, float] = {}
    for path, mine, its in pairs:
        if (id(mine), id(its)) not in taken:
            difference = its.to(mine.device, torch.float32) - mine.to(torch.float32)
            square = float(difference.double().square().sum())
            if square:
                left[path] = square
    if not made.factors:
        only = f"; {len(left)} other parameters do, {next(iter(left))} first" if left else ""
        raise UserError(f"the two models do not differ in target_modules={chosen!r}{only}")
    set_lora(roster, name, made.factors)
    return made.result(left)


@contextmanager
def as_plain(roster: Roster, name: str) -> Iterator[str]:
    """Have a LoRA `name` in the model for a while without its start; yield the name it has then.

    s (B A - B_0 A_0) is the product of [s B, -s B_0] [O, 2R] and [A; A_0] [2R, I].
    """
    factors, copies = {}, {}
    for path, _, adapter in roster.adapters(name):
        thin = adapter.factors(torch.float32) if isinstance(adapter, Lora) else None
        if thin is not None:
            factors[path] = thin
        elif isinstance(adapter, Copy):
            copies[path] = adapter
        else:
            raise UserError(
                f"adapter {name!r} is {type(adapter).__name__} at {path!r}, which is no product of "
                "two factors: use save_as_lora(folder, model, rank)"
            )
        if getattr(adapter, "bias", None) is not None:
            raise UserError(f"adapter {name!r} trains biases: only as it is can it be saved")
    old, new = (
        roster.configs[name],
        next(n for n in (f"plain-{i}" for i in count()) if n not in roster.configs),
    )
    set_lora(
        roster,
        new,
        factors,
        copies=copies,
        trainable=False,
        modules_to_save=old.modules_to_save if copies else None,
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
        revision=old.revision,
    )
    try:
        yield new
    finally:
        roster.remove(new)


class _Made:
    """Factors of the sites so far, and the squares of their updates and of what is left out."""

    def __init__(self, rank: int | float) -> None:
        self.rank = rank
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._squares: dict[str, tuple[float, float]] = {}

    def add(self, path: str, found: Spectrum) -> None:
        rank = found.rank(self.rank)
        b, a = found.factors(rank)
        self.factors[path] = b.contiguous(), a.contiguous()  # no view that holds all of U and V
        self._squares[path] = found.squares(rank), found.squares()

    def result(self, left: dict[str, float]) -> Approximation:
        lost = sum(part for part, _ in self._squares.values()) + sum(left.values())
        whole = sum(whole for _, whole in self._squares.values()) + sum(left.values())
        return Approximation(
            total=relative(lost, whole),
            errors={path: relative(*squares) for path, squares in self._squares.items()},
            ranks={path: len(a) for path, (_, a) in self.factors.items()},
            left_out={name: relative(square, whole) for name, square in left.items()},
        )


def _spectrum(name: str, path: str, base: Base, adapter: Adapter) -> Spectrum:
    if not isinstance(adapter, Reweight) or base.kind not in Lora.on:
        why = "no weight can say it" if not isinstance(adapter, Reweight) else f"a {base.kind}"
        raise UserError(
            f"adapter {name!r} cannot be a LoRA: {type(adapter).__name__} at {path!r} has no place "
            f"in one ({why})"
        )
    wide = torch.promote_types(base.dtype, torch.float32)
    below = base.bias()
    bias = adapter.rebias(base)
    same = bias is below or (bias is not None and below is not None and torch.equal(bias, below))
    if isinstance(adapter, Bias) or not same:
        raise UserError(
            f"adapter {name!r} changes the bias of {path!r}, which a LoRA's update of the weight "
            "cannot hold: merge the adapter instead"
        )
    thin = adapter.factors(wide) if isinstance(adapter, Delta) else None
    if thin is not None:
        return of_product(*thin)
    weight = base.weight().to(wide)
    new = adapter.reweight(weight, None if below is None else below.to(wide))[0]
    return of_matrix(new - weight)


def _pairs(model: nn.Module, tuned: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Return (name, ours, theirs) of every parameter, a tied pair once.

    UserError where one has no counterpart of its shape.
    """
    if tuned is model or any(isinstance(m, Inlaid) for m in tuned.modules()):
        raise UserError(
            "the tuned model must be a plain one beside the base: merge_and_unload() its adapters, "
            "and load the base anew"
        )
    mine, theirs = (
        {
            f"{path}.{name}": p
            for path, module in targets.modules(side)
            for name, p in targets.plain(module)._parameters.items()
            if p is not None
        }
        for side in (model, tuned)
    )
    odd = sorted(mine.keys() ^ theirs.keys())
    odd += [name for name in mine if name in theirs and mine[name].shape != theirs[name].shape]
    if odd:
        raise UserError(
            f"the tuned model is not of the base's architecture: {len(odd)} parameters have no "
            f"counterpart of the same shape, {odd[0]!r} first"
        )
    once = {(id(p), id(theirs[name])): name for name, p in reversed(mine.items())}
    return [(name, mine[name], theirs[name]) for name in reversed(once.values())]


def _check_rank(rank: int | float) -> None:
    if not isinstance(rank, float):
        check_whole("rank", rank)
    elif not 0 < rank <= 1:
        raise UserError(
            f"rank={rank!r} as a share of the update's squares must be above 0 and at most 1"
        )

"""One LoRA out of several: weighted sums of updates, and what spares them from canceling out.

    cat, svd          sum_i w_i s_i B_i A_i, exactly; svd cuts it to a rank
    linear            (sum_i sqrt(w_i s_i) B_i) (sum_i sqrt(w_i s_i) A_i): cheap, with cross terms
    magnitude_prune   each tensor cut to its largest entries, then summed
    ties              the same, then the mean of those that agree with the elected sign
                      (Yadav et al., arXiv:2306.01708)
    dare_linear       each entry kept with probability d and divided by d (Yu et al.,
    dare_ties         arXiv:2311.03099), then as linear, as ties

The last four work on the factors, and with `_svd` after their name on the updates themselves.
O output features, I input features, R rank, N adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.core.adapter import Adapter
from inlay.core.beside import Copy
from inlay.core.errors import UserError, nearest
from inlay.core.numbers import check_whole
from inlay.core.targeted import TargetedConfig
from inlay.methods.lora import Lora, LoraConfig
from inlay.model.lowrank import of_matrix, of_product, set_lora
from inlay.model.roster import Roster

PRUNING = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
TYPES = ("cat", "svd", "linear", *PRUNING, *(f"{how}_svd" for how in PRUNING))
DRIVERS = ("gesvd", "gesvdj", "gesvda")


class Way(NamedTuple):
    """How to combine: `combination_type` and what belongs to it, by PEFT's names."""

    combination_type: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"


class Part(NamedTuple):
    """One adapter's share of a site: weight times B [O, R] A [R, I], times its own scale."""

    weight: float
    scale: float
    b: Tensor
    a: Tensor


@torch.no_grad()
def combine(
    roster: Roster, names: Sequence[str], weights: Sequence[float], new: str, way: Way
) -> None:
    """Set the LoRA `new` into the model, combined of the named ones; on any error nothing is.

    It holds a site wherever one of them does, of the rank it needs there. UserError for adapters
    that are no plain LoRA, for copies of a module in more than one of them, and for settings that
    have no meaning.
    """
    _check(roster, names, weights, way)
    first = roster.configs[names[0]]
    assert isinstance(first, LoraConfig)
    roster.check_new(new, first)
    parts: dict[str, list[Part]] = {}
    copies: dict[str, Copy] = {}
    for name, weight in zip(names, weights, strict=True):
        for path, _, adapter in roster.adapters(name):
            if not isinstance(adapter, Copy):
                parts.setdefault(path, []).append(_part(name, path, adapter, weight))
            elif path in copies:
                raise UserError(
                    f"{path!r} has a trained copy in more than one of {list(names)}, and two "
                    "copies have no sum: combine adapters of which one at most trains it in full"
                )
            else:
                copies[path] = adapter
    rank = way.svd_rank or max(_rank(roster.configs[name]) for name in names)
    set_lora(
        roster,
        new,
        {path: _combined(path, shares, way, rank) for path, shares in parts.items()},
        copies=copies,
        trainable=any(name in roster.trainable for name in names),
        modules_to_save=_saved(roster, names) if copies else None,
        task_type=first.task_type,
        lora_dropout=first.lora_dropout,
        fan_in_fan_out=first.fan_in_fan_out,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        inference_mode=first.inference_mode,
    )


def mixed(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    how: str,
    density: float | None = None,
    majority: str = "total",
) -> Tensor:
    """Return tensors of one shape combined by linear, magnitude_prune, ties or dare_*."""
    if density is not None and density < 1:
        prune = dropped if how.startswith("dare") else largest
        tensors = [prune(tensor, density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
    weighted = stacked * factors.reshape(-1, *[1] * (stacked.ndim - 1))
    if not how.endswith("ties"):
        return weighted.sum(0)
    agree = agreeing(stacked, majority)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def largest(tensor: Tensor, density: float) -> Tensor:
    """Return the tensor with all but its `density` share of largest magnitudes at zero."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * len(flat)), sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(tensor.shape)


def dropped(tensor: Tensor, density: float) -> Tensor:
    """Return the tensor with each entry kept with probability `density`; its mean is the tensor.

    Drawn from torch's own generator: torch.manual_seed repeats it.
    """
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def agreeing(stacked: Tensor, majority: str) -> Tensor:
    """Return which entries of `stacked` [N, ...] have the sign that won at their place.

    Elected by the sum of the entries ("total") or of their signs ("frequency"); a tie is positive.
    """
    votes = (stacked if majority == "total" else stacked.sign()).sum(0)
    return stacked.sign() == torch.where(votes >= 0, 1, -1)


def _combined(path: str, parts: list[Part], way: Way, rank: int) -> tuple[Tensor, Tensor]:
    """Return B and A of one site, where an SVD is made, of at most `rank`."""
    how = way.combination_type
    if how not in ("cat", "svd") and not how.endswith("_svd"):
        return _by_factor(path, parts, way)
    b = torch.cat([p.b for p in parts], dim=1)
    a = torch.cat([p.weight * p.scale * p.a for p in parts])
    if how == "cat":
        return b, a
    if how == "svd" and way.svd_clamp is None:
        return of_product(b, a, way.svd_driver).factors(rank)
    if how == "svd":  # a clamp depends on the vectors' signs, which are the solver's choice
        delta = b @ a
    else:
        updates = [p.scale * (p.b @ p.a) for p in parts]
        weights = [p.weight for p in parts]
        kind = how.removesuffix("_svd")
        delta = mixed(updates, weights, kind, way.density, way.majority_sign_method)
    found = of_matrix(delta, way.svd_driver)
    b, a = found.factors(found.rank(rank))
    if way.svd_clamp is not None:
        limit = _quantile(torch.cat([b.flatten(), a.flatten()]), way.svd_clamp)
        b, a = b.clamp(-limit, limit), a.clamp(-limit, limit)
    return b, a


def _by_factor(path: str, parts: list[Part], way: Way) -> tuple[Tensor, Tensor]:
    """Combine the B of all with each other, and the A: the square root of a weight goes to each."""
    ranks = [len(p.a) for p in parts]
    if len(set(ranks)) > 1:
        raise UserError(
            f"combination_type={way.combination_type!r} needs one rank, and at {path!r} the "
            f"adapters have {ranks}: use 'cat', 'svd' or a type that ends in _svd"
        )
    total = [p.weight * p.scale for p in parts]
    roots = [math.sqrt(abs(t)) for t in total]
    signed = [math.copysign(root, t) for root, t in zip(roots, total, strict=True)]
    settings = (way.combination_type, way.density, way.majority_sign_method)
    a = mixed([p.a for p in parts], signed, *settings)  # A first: dare draws in PEFT's order
    return mixed([p.b for p in parts], roots, *settings), a


def _quantile(values: Tensor, share: float) -> float:
    """Return the quantile with linear interpolation; torch's own refuses more than 2^24 values."""
    ordered = values.sort().values
    at = share * (len(ordered) - 1)
    low = int(at)
    below, above = float(ordered[low]), float(ordered[min(low + 1, len(ordered) - 1)])
    return below + (at - low) * (above - below)


def _part(name: str, path: str, adapter: Adapter, weight: float) -> Part:
    if not isinstance(adapter, Lora):
        raise UserError(
            f"adapter {name!r} is {type(adapter).__name__} at {path!r}, and only the factors of "
            "plain LoRAs can be combined: convert it first, convert_to_lora(name, rank, new_name)"
        )
    if adapter.start_A is not None:
        raise UserError(
            f"adapter {name!r} has a start taken off the base (init_lora_weights="
            f"{adapter.config.init_lora_weights!r}), so its factors alone are not its update: "
            "convert it first, convert_to_lora(name, rank, new_name)"
        )
    if adapter.bias is not None:
        raise UserError(
            f"adapter {name!r} trains biases ({path!r}), which no other adapter of the model may: "
            "combine adapters with bias='none'"
        )
    b, a = (
        p.to(torch.promote_types(p.dtype, torch.float32)) for p in (adapter.lora_B, adapter.lora_A)
    )
    return Part(float(weight), adapter.config.scaling, b, a)


def _rank(config: TargetedConfig) -> int:
    assert isinstance(config, LoraConfig)
    return max(config.r, *config.rank_pattern.values(), 1)


def _saved(roster: Roster, names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(m for n in names for m in roster.configs[n].modules_to_save or ()))


def _check(roster: Roster, names: Sequence[str], weights: Sequence[float], way: Way) -> None:
    how, density = way.combination_type, way.density
    if isinstance(names, str) or not names:
        raise UserError(f"adapters={names!r} must be a list of the adapters to combine")
    roster.check(*names)
    if how not in TYPES:
        raise UserError(
            f"combination_type={how!r} is not one of {', '.join(TYPES)}.{nearest(str(how), TYPES)}"
        )
    if len(weights) != len(names):
        raise UserError(f"{len(weights)} weights for {len(names)} adapters: give one each")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"weights={list(weights)} must be numbers")
        if not math.isfinite(weight):
            raise UserError(f"weights={list(weights)} must be finite")
    for name in names:
        if not isinstance(roster.configs[name], LoraConfig):
            raise UserError(
                f"adapter {name!r} is {roster.configs[name].peft_type}, and only LoRAs can be "
                "combined: convert it first, convert_to_lora(name, rank, new_name)"
            )
    if how.removesuffix("_svd") in PRUNING:
        if (
            isinstance(density, bool)
            or not isinstance(density, int | float)
            or not 0 < density <= 1
        ):
            raise UserError(
                f"density={density!r}: combination_type={how!r} needs the share of entries to "
                "keep, above 0 and at most 1"
            )
    elif density is not None:
        raise UserError(f"density={density!r} has no meaning for combination_type={how!r}")
    if way.majority_sign_method not in ("total", "frequency"):
        raise UserError(
            f"majority_sign_method={way.majority_sign_method!r} is not one of total, frequency"
        )
    _check_svd(roster, names, way)


def _check_svd(roster: Roster, names: Sequence[str], way: Way) -> None:
    if not way.combination_type.endswith("svd"):
        given = {k: getattr(way, k) for k in ("svd_rank", "svd_clamp", "svd_driver")}
        for field, value in given.items():
            if value is not None:
                raise UserError(
                    f"{field}={value!r} has no meaning for "
                    f"combination_type={way.combination_type!r}"
                )
        return
    if way.svd_rank is not None:
        check_whole("svd_rank", way.svd_rank)
    clamp: Any = way.svd_clamp
    if clamp is not None and not (isinstance(clamp, int | float) and 0.5 < clamp <= 1):
        raise UserError(f"svd_clamp={clamp!r} is a quantile, above 0.5 and at most 1")
    if way.svd_driver is not None:
        if way.svd_driver not in DRIVERS:
            raise UserError(f"svd_driver={way.svd_driver!r} is not one of {', '.join(DRIVERS)}")
        if not all(h.base.device.type == "cuda" for n in names for _, h, _ in roster.adapters(n)):
            raise UserError(
                f"svd_driver={way.svd_driver!r} is a choice for CUDA only: leave it out"
            )

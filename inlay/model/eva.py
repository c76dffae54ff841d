"""EVA over the layers of a model: whose inputs are looked at, and how the ranks are dealt out.

The mathematics is in `inlay.inits.eva`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core import patterns
from inlay.core.errors import UserError
from inlay.inits.eva import Components, leaders_first, share_out
from inlay.methods._starts import EvaConfig
from inlay.methods.lora import Lora, LoraConfig
from inlay.model.lowrank import key_of
from inlay.model.observe import Layers, Tell, watched
from inlay.model.places import spelled_out
from inlay.model.roster import Roster

MOST_PASSES = 10
"""Passes over the data after which the directions are taken as they are."""


@torch.no_grad()
def find_eva(
    layers: Layers,
    config: LoraConfig,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    pick: Callable[[Any], Callable[[str, Tensor], Tensor]],
    tell: Tell,
) -> dict[str, Tensor]:
    """Return by path EVA's A [rank, I], of rank 0 where other layers have more use for it.

    batches: gone through again and again, at most MOST_PASSES times, until all directions are
    settled. forward: runs the base on one. pick: of a batch, what takes from a layer's input the
    rows [N, I] that count.
    """
    settings = config.eva_config
    assert isinstance(settings, EvaConfig)
    with patterns.budget():
        ranks = {path: config.at(path).r for path in layers}
    groups, first = _of_one_input(layers, batches, forward)
    alike = {member: leader for leader, members in groups.items() for member in members}
    most = {path: round(rank * settings.rho) for path, rank in ranks.items()}
    for leader, members in groups.items():
        most[leader] = max(most[path] for path in (leader, *members))
    found = {path: Components(most[path], settings.tau) for path in layers if path not in alike}
    of_path = {**{path: path for path in found}, **alike}
    wanted = {path: found[leader].count for path, leader in of_path.items()}
    batch, turn = first, 0
    for turn, batch in enumerate(_again(batches), start=1):
        open_ = {p: layers[p] for p, c in found.items() if not c.settled[: wanted[p]].all()}
        if turn & (turn - 1) == 0 or not open_:
            done = sum(of_path[path] not in open_ for path in layers)
            tell(f"EVA: {done} of {len(layers)} layers settled after {turn - 1} batches")
        if not open_:
            break
        with watched(open_, _into(found, pick(batch))):
            forward(batch)
        if all(part.vectors is not None for part in found.values()):
            shares = {path: found[leader].shares for path, leader in of_path.items()}
            wanted = leaders_first(share_out(shares, sum(ranks.values())), groups)
    else:
        if any(part.vectors is None for part in found.values()):
            raise UserError("EVA: the data has fewer positions than r * rho: give more rows")
        warnings.warn(
            f"EVA: not all directions settled in {MOST_PASSES} passes over the data: they are "
            "taken as they are; a lower tau in eva_config settles them sooner",
            stacklevel=2,
        )
    return {path: _first_factor(found[of_path[path]], wanted[path], settings) for path in layers}


def _into(
    found: Mapping[str, Components], take: Callable[[str, Tensor], Tensor]
) -> Callable[[str, Tensor], None]:
    return lambda path, x: found[path].add(take(path, x))


def _first_factor(found: Components, rank: int, settings: EvaConfig) -> Tensor:
    assert found.vectors is not None
    a = found.vectors[:rank]
    return a / found.values[:rank, None].sqrt() if settings.whiten else a


def _again(batches: Iterable[Any]) -> Iterator[Any]:
    for _ in range(MOST_PASSES):
        yield from batches


def _of_one_input(
    layers: Layers, batches: Iterable[Any], forward: Callable[[Any], Any]
) -> tuple[dict[str, list[str]], Any]:
    """Return leader -> the other layers that are called with the very same tensor; and a batch."""
    first = next(iter(batches), None)
    if first is None:
        raise UserError("EVA: there are no batches to look at")
    inputs: list[tuple[str, Tensor]] = []
    groups: dict[str, list[str]] = {}

    def see(path: str, x: Tensor) -> None:
        same = (lead for lead, t in inputs if t.data_ptr() == x.data_ptr() and t.shape == x.shape)
        leader = next(same, None)
        if leader is None:
            inputs.append((path, x))  # held, so that no other tensor gets its place in memory
        else:
            groups.setdefault(leader, []).append(path)

    with watched(layers, see):
        forward(first)
    unseen = layers.keys() - {path for path, _ in inputs} - {p for g in groups.values() for p in g}
    if unseen:
        raise UserError(
            f"EVA: the base does not call {sorted(unseen)[0]!r} on this data, so there are no "
            "inputs to look at: leave it out of target_modules"
        )
    return groups, first


def with_ranks(
    config: LoraConfig, found: Mapping[str, Tensor], paths: Iterable[str], model: nn.Module
) -> LoraConfig:
    """Return EVA's configuration with the ranks of what was found; layers of rank 0 get none.

    paths: all sites, of which those that EVA cannot start keep their rank.
    """
    settings = config.eva_config
    assert isinstance(settings, EvaConfig)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    with patterns.budget():
        for path in paths:
            here = config.at(path)
            ranks[path] = len(found[path]) if path in found else here.r
            grown = ranks[path] / here.r if settings.adjust_scaling_factors else 1
            alphas[path] = here.lora_alpha * grown
    left = {path: rank for path, rank in ranks.items() if rank}
    if not left:
        raise UserError("EVA: no layer has a direction to start in: give other data")
    return config.replace(
        target_modules=spelled_out(tuple(left), model),
        rank_pattern={key_of(p, left): rank for p, rank in left.items() if rank != config.r},
        alpha_pattern={key_of(p, left): alphas[p] for p in left if alphas[p] != config.lora_alpha},
    )


@torch.no_grad()
def start_eva(roster: Roster, name: str, found: Mapping[str, Tensor]) -> None:
    """Set the LoRA called `name` in anew with the ranks of what EVA found, and that as its A."""
    config = roster.configs[name]
    assert isinstance(config, LoraConfig)
    paths = [path for path, _, adapter in roster.adapters(name) if isinstance(adapter, Lora)]
    unknown = found.keys() - set(paths)
    if unknown:
        raise UserError(f"EVA found a start for {sorted(unknown)[0]!r}, which {name!r} is not on")
    config = with_ranks(config, found, paths, roster.model)
    trainable = name in roster.trainable
    roster.remove(name)
    roster.add(name, config, trainable=trainable)
    for path, _, adapter in roster.adapters(name):
        if path in found and isinstance(adapter, Lora):
            adapter.lora_A.copy_(found[path])

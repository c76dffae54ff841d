"""Fast paths for a while: the same mathematics as the plain layers, put on their hosts.

Nothing is asked of a model but what it does: a forward pass of a few tokens tells which hosts are
fed one tensor (q, k, v; gate, up), and these share a node, in which the first one called computes
for all. No method knows of it: an adapter takes part if its update is a product of two thin
factors. Which adapters there are is asked at each call, so that one which is added, switched to or
taken out meanwhile is computed as it stands. Law 1 holds for the fast paths too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from inlay.bases.plain import Linear
from inlay.core.base import is_bare
from inlay.core.inlaid import Inlaid
from inlay.kernels import lora
from inlay.model.thin import Site, site

FEW = 16
"""Tokens below which the plain layers are faster, where no gradient is noted."""


@contextmanager
def accelerated(model: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Let the active adapter of `model` compute by fast paths for a `with` block.

    run: makes one forward pass of the model, without a gradient. A batch of rows with adapters of
    their own, a stack of adapters and a merged one take the plain paths as before, and so do layers
    that get an adapter for the first time within the block.
    """
    hosts = [m for m in model.modules() if isinstance(m, Inlaid) and isinstance(m.base, Linear)]
    before = [host.fast for host in hosts]
    for group in fed_alike(hosts, run) if hosts else []:
        node = Node(group)
        for i, host in enumerate(group):
            host.fast = partial(node.call, i)
    try:
        yield
    finally:
        for host, path in zip(hosts, before, strict=True):
            host.fast = path


def by_nodes(model: nn.Module) -> list[Inlaid]:
    """Return the hosts of `model` whose active adapter is computed by a fast path now."""
    paths = {m: m.fast for m in model.modules() if isinstance(m, Inlaid)}
    nodes = {host: path for host, path in paths.items() if isinstance(path, partial)}
    return [host for host, path in nodes.items() if cast(Any, path.func).__self__.takes(*path.args)]


def fed_alike(hosts: Sequence[Inlaid], run: Callable[[], Any]) -> list[list[Inlaid]]:
    """Return the hosts in groups that one tensor is fed to in turn, as `run` shows; else alone."""
    calls: list[tuple[Inlaid, Tensor]] = []  # which holds the tensors, so that none lends its place

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append((cast(Inlaid, module), args[0] if args else torch.empty(0)))

    hooks = [host.register_forward_pre_hook(note) for host in hosts]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(host for host, _ in calls)
    groups: list[list[Inlaid]] = []
    last: Tensor | None = None
    for host, x in calls:
        if times[host] != 1:
            last = None  # called again, with who knows what: it computes for itself
        elif last is x and groups:
            groups[-1].append(host)
        else:
            groups.append([host])
            last = x
    alone = {id(h) for group in groups for h in group}
    return groups + [[host] for host in hosts if id(host) not in alone]


class Node:
    """Hosts that are fed one tensor: the first one called computes for all, the others collect.

    A copy of the model (`copy.deepcopy`) has nodes of its own, which hold its own hosts.
    """

    def __init__(self, hosts: Sequence[Inlaid]) -> None:
        """Take the hosts, in the order in which they are called."""
        self.hosts = hosts
        self._known: dict[str, tuple[list[Any], list[Site | None]]] = {}
        self._made: _Made | None = None

    def call(self, index: int, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the host of that number computes."""
        host = self.hosts[index]
        names = host.selection.active
        # torch.compile has the plain layers to see into
        here = len(names) == 1 and not args and not kwargs and not torch.compiler.is_compiling()
        if here and not _few(x):
            sites = self.sites(names[0])
            one = sites[index]
            dtype = None if one is None else _dtype(one, x)
            if one is not None and dtype is not None:
                return self._collect(index, one, sites, x, dtype)
        return host.stack(names)(x, *args, **kwargs)

    def takes(self, index: int) -> bool:
        """Return whether this computes the active adapter of the host of that number."""
        chosen = self.hosts[index].selection
        plain = chosen.merged or chosen.rows is not None or len(chosen.active) != 1
        return not plain and self.sites(chosen.active[0])[index] is not None

    def sites(self, name: str) -> list[Site | None]:
        """Return the sites of the adapter of that name, None where a host's is not for the node."""
        now = [_standing(host, name) for host in self.hosts]
        known = self._known.get(name)
        if known is None or any(a is not b for a, b in zip(known[0], now, strict=True)):
            found = zip(self.hosts, now, strict=True)
            known = now, [None if a is None else site(host, name) for host, a in found]
            left = {n for host in self.hosts for n in host.adapters}
            self._known = {n: k for n, k in self._known.items() if n in left} | {name: known}
        return known[1]

    def _collect(
        self, index: int, one: Site, sites: Sequence[Site | None], x: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return the output of one host, computing those of all where they are not there yet."""
        if len(self.hosts) == 1 or x.is_inference():  # which has no version to know it by
            return _compute(x, {index: one}, dtype)[index]
        told = (x._version, dtype, torch.is_grad_enabled(), one.adapter.training)
        made = self._made  # once, for another thread may be at it too
        fresh = made is None or made.x is not x or made.told != told
        if made is None or fresh or made.versions.get(index) != (one, one.version):
            alike = {i: s for i, s in enumerate(sites) if s is not None and _dtype(s, x) == dtype}
            versions = {i: (s, s.version) for i, s in alike.items()}
            made = self._made = _Made(x, told, versions, _compute(x, alike, dtype))
        out = made.outs.pop(index)
        del made.versions[index]
        if not made.outs:
            self._made = None
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over: nothing that was computed."""
        return {**vars(self), "_known": {}, "_made": None}


@dataclass
class _Made:
    """What a node computed of `x`, told so, for hosts that have not collected it yet."""

    x: Tensor
    told: tuple[Any, ...]
    versions: dict[int, tuple[Site, int]]
    outs: dict[int, Tensor]


def _compute(x: Tensor, sites: Mapping[int, Site], dtype: torch.dtype) -> dict[int, Tensor]:
    outs = lora.adapted(x, [one.member(dtype) for one in sites.values()], dtype)
    return {i: one.finish(out) for (i, one), out in zip(sites.items(), outs, strict=True)}


def _standing(host: Inlaid, name: str) -> nn.Module | None:
    """Return the adapter of that name; None where the layer below it is not to be passed by."""
    layer = host.base.module
    trains = any(p is not None and p.requires_grad for p in layer._parameters.values())
    return host.adapters._modules.get(name) if is_bare(layer) and not trains else None


def _few(x: Any) -> bool:
    """Return whether there is little to compute, as in generating, and no gradient of it."""
    small = isinstance(x, Tensor) and x.ndim > 0 and x.numel() < FEW * x.shape[-1]
    return small and not torch.is_grad_enabled()


def _dtype(one: Site, x: Any) -> torch.dtype | None:
    """Return what the plain path would compute in; None where its parts differ in that."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    alike = one.layer.dtype == x.dtype == one.dtype
    return x.dtype if alike else None

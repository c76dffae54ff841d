"""Fast paths for a while: the same mathematics as the plain layers, put on their hosts.

Nothing is asked of a model but what it does: a forward pass of a few tokens tells which hosts are
fed one tensor (q, k, v; gate, up), and these share a node, in which the first one called computes
for all. No method knows of it: an adapter takes part if its update is a product of two thin
factors. Law 1 holds for the fast paths too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from inlay.core.inlaid import Inlaid
from inlay.kernels import lora
from inlay.model.thin import Site, site


@contextmanager
def accelerated(model: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Let the active adapter of `model` compute by fast paths for a `with` block.

    run: makes one forward pass of the model, without a gradient. A batch of rows with adapters of
    their own, another active adapter and a merged one take the plain paths as before.
    """
    hosts = [m for m in model.modules() if isinstance(m, Inlaid)]
    names = hosts[0].selection.active if hosts else ()
    found = {h: site(h, names[0]) for h in hosts} if len(names) == 1 else {}
    sites = {host: one for host, one in found.items() if one is not None}
    for group in fed_alike(list(sites), run) if sites else []:
        node = _Node([sites[host] for host in group])
        for i, host in enumerate(group):
            host.fast[names] = node.of(i)
    try:
        yield
    finally:
        for host in sites:
            host.fast.pop(names, None)


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


class _Node:
    """Hosts that are fed one tensor: the first one called computes for all, the others collect."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.waiting: tuple[Tensor, int, bool] | None = None
        self.made: dict[int, Tensor] = {}

    def of(self, index: int) -> Callable[..., Any]:
        """Return the fast path of the host of that number."""
        one = self.sites[index]

        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            dtype = _dtype(one, x)
            if args or kwargs or dtype is None:
                return one.host.stack(one.host.selection.active)(x, *args, **kwargs)
            return self.collect(index, x, dtype)

        return call

    def collect(self, index: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the output of one host, computing those of all where they are not there yet."""
        if len(self.sites) == 1:
            return self.compute(x, dtype)[0]
        # the version tells of a tensor that was written to since
        given = (x, x._version, torch.is_grad_enabled())
        fresh = self.waiting is None or self.waiting[0] is not x or self.waiting[1:] != given[1:]
        if fresh or index not in self.made:
            self.waiting, self.made = given, dict(enumerate(self.compute(x, dtype)))
        out = self.made.pop(index)
        if not self.made:
            self.waiting = None
        return out

    def compute(self, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return the outputs of all."""
        outs = lora.adapted(x, [one.member(dtype) for one in self.sites], dtype)
        return [one.finish(out) for one, out in zip(self.sites, outs, strict=True)]


def _dtype(one: Site, x: Any) -> torch.dtype | None:
    """Return what the plain path would compute in; None where its parts differ in that."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    alike = one.layer.dtype == x.dtype == one.dtype
    return x.dtype if alike else None

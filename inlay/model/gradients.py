"""Which adapters' parameters require gradients: flipped from flat lists, with no walk over modules.

A model of 200 LoRA sites has 400 parameters an adapter; a switch between two adapters in training
turns 800 flags, which is near the floor of what Python can do in 50 microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from inlay.core.adapter import Adapter


class Gradients:
    """The parameters of each adapter, and the names of those that require gradients."""

    def __init__(self) -> None:
        """Know no adapter."""
        self._adapters: dict[str, Sequence[Adapter]] = {}
        self._lists: dict[str, tuple[tuple[nn.Parameter, ...], tuple[Adapter, ...]]] = {}
        self._on: frozenset[str] = frozenset()
        self._placed = Adapter.placed

    def start(self, name: str, adapters: Sequence[Adapter], *, on: bool) -> None:
        """Take up an adapter, its parameters requiring gradients or not."""
        self._adapters[name] = adapters
        for adapter in adapters:
            adapter.requires_grad_(on)
        if on:
            self._on |= {name}

    def forget(self, name: str) -> None:
        """Let an adapter go."""
        self._adapters.pop(name, None)
        self._lists.pop(name, None)
        self._on -= {name}

    def only(self, names: Iterable[str]) -> None:
        """Let the parameters of `names` require gradients, and no longer those that did before."""
        chosen = frozenset(names)
        if self._placed != Adapter.placed:  # some parameters may have been replaced
            self._lists.clear()
            self._placed = Adapter.placed
        for name in self._on - chosen:
            self._turn(name, False)
        for name in chosen:
            self._turn(name, True)
        self._on = chosen

    def _turn(self, name: str, on: bool) -> None:
        if name not in self._lists:
            self._lists[name] = _listed(self._adapters.get(name, ()))
        parameters, walked = self._lists[name]
        for parameter in parameters:
            parameter.requires_grad = on
        for adapter in walked:
            adapter.requires_grad_(on)


def _listed(adapters: Sequence[Adapter]) -> tuple[tuple[nn.Parameter, ...], tuple[Adapter, ...]]:
    """Return all parameters in a flat list, but for adapters with modules inside, which are walked.

    Only an adapter's own parameters are counted when they are replaced (`Adapter.placed`).
    """
    own = [adapter for adapter in adapters if not adapter._modules]
    flat = tuple(
        p
        for adapter in own
        for name, p in adapter._parameters.items()
        if p is not None and name not in adapter.frozen
    )
    return flat, tuple(adapter for adapter in adapters if adapter._modules)

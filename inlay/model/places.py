"""Where a model's modules stand: every path of each, and what puts another module there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from inlay.core import patterns
from inlay.model.targets import modules, plain


class Places:
    """The modules of a model by path, hosts standing for their layers, as they are now.

    modules: path -> module; one reachable by several paths stands under each.
    """

    def __init__(self, model: nn.Module) -> None:
        """Walk the model once."""
        self.modules = dict(modules(model))
        self._model = model
        self._paths: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            self._paths.setdefault(id(plain(module)), []).append(path)

    def put(self, path: str, module: nn.Module) -> None:
        """Set `module` where the one at `path` stands, on every path that leads there."""
        for place in self._paths[id(plain(self.modules[path]))]:
            above, _, name = place.rpartition(".")
            parent = plain(self.modules[above]) if above else self._model
            parent._modules[name] = module


def spelled_out(sites: Sequence[str], model: nn.Module) -> list[str]:
    """Return target_modules that mean exactly `sites`: last names if these suffice, else paths."""
    last = {path.rpartition(".")[2] for path in sites}
    meant = set(sites)
    suffice = all(p in meant for p, _ in modules(model) if any(e in last for e in patterns.ends(p)))
    return sorted(last) if suffice else sorted(sites)


def is_tied(model: nn.Module) -> bool:
    """Return whether the head of a transformers model holds the input embedding's own weight."""
    found: list[Any] = [
        getattr(model, getter, lambda: None)()
        for getter in ("get_input_embeddings", "get_output_embeddings")
    ]
    if any(module is None for module in found):
        return True  # there are no two that could have parted
    embedding, head = (getattr(plain(module), "weight", None) for module in found)
    return embedding is head

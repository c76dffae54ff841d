"""Where a model's modules stand: every path of each, and what puts another module there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from inlay.core import patterns
from inlay.core.targeted import TargetedConfig
from inlay.model.defaults import HEADS
from inlay.model.targets import Sites, is_all_linear, modules, plain


class Places:
    """The modules of a model by path, hosts standing for their layers, as they are now.

    modules: path -> module; one reachable by several paths stands under each, the model under "".
    """

    def __init__(self, model: nn.Module) -> None:
        """Walk the model once."""
        self.modules = dict(modules(model))
        self._model = model
        self._paths: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            self._paths.setdefault(id(plain(module)), []).append(path)
        self.modules[""] = model

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


def resolved(config: TargetedConfig, sites: Sites, model: nn.Module) -> TargetedConfig:
    """Return the configuration with what it leaves to the model filled in, as files state it."""
    given = None if config.rooted else config.wanted(dict(modules(model)))
    changes: dict[str, Any] = {}
    if not config.rooted and sites.adapted and (given is None or is_all_linear(given)):
        changes["target_modules"] = spelled_out(sites.adapted, model)
    heads = HEADS.get(config.task_type or "", [])
    if heads:
        changes["modules_to_save"] = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
    return config.replace(**changes) if changes else config


def no_longer_tied(model: nn.Module) -> None:
    """Say so in a transformers model's configuration where its head has parted from the embedding.

    Else a reader of the saved folder would tie them again.
    """
    settings: Any = getattr(model, "config", None)
    # some encoder-decoder models also scale their outputs by this flag; transformers itself sees
    # two different weights in the file and leaves them apart
    if getattr(settings, "is_encoder_decoder", False) or not hasattr(settings, "get_text_config"):
        return
    tied = [
        part
        for part in (settings, settings.get_text_config())
        if getattr(part, "tie_word_embeddings", False)
    ]
    if not tied:
        return
    try:
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not every model has one of each
        return
    embedding, head = (getattr(plain(m), "weight", None) if m is not None else None for m in layers)
    if embedding is not None and head is not None and embedding is not head:
        for part in tied:
            part.tie_word_embeddings = False

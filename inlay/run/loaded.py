"""A base in memory, with what a run needs of it; several runs may share one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from inlay.config.schema import RunConfig
from inlay.data.labels import read_labels
from inlay.model.heads import draw_heads, head_seed
from inlay.model.load import load_whole
from inlay.run.folder import base_arguments
from inlay.run.limits import check_base, readable


@dataclass
class Loaded:
    """A base, without adapters, and its tokenizer."""

    base: Any
    tokenizer: Any
    labels: tuple[str, ...] | None = None
    """The classes of a base for classification."""
    new: tuple[str, ...] = ()
    """The parameters that the checkpoint had not: a new head."""
    drawn_from: int | None = None
    """The seed that the new parameters come from; None where there are none."""
    scores: dict[int | None, dict[str, Any]] = field(default_factory=dict)
    """drawn_from -> what the base scores on the held-out rows, which all its runs share."""

    def redraw(self, seed: int) -> None:
        """Draw the new parameters from a run's seed."""
        if self.new:
            draw_heads(self.base, self.new, head_seed(seed))
            self.drawn_from = seed

    def objective(self, config: RunConfig) -> Any:
        """Return the objective of a run over this base, which packs where that was asked for."""
        labels = {} if self.labels is None else {"labels": list(self.labels)}
        given = {"packing": bool(config.train.packing), "fast": config.train.fast, **labels}
        known = {field.name for field in fields(config.objective)}
        return replace(config.objective, **{k: v for k, v in given.items() if k in known})

    @contextmanager
    def given_back(self, model: Any) -> Iterator[None]:
        """Take the adapter out of `model`, over this base, at the end of a `with` block.

        Where the base itself trains, its tensors are copied before and put back.
        """
        kept: dict[str, Tensor] = {}
        if not model.roster.hosts:
            kept = {name: t.detach().clone() for name, t in self.base.state_dict().items()}
        try:
            yield
        finally:
            model.unload()
            self.base.eval()
            for name, tensor in self.base.state_dict().items():
                if name in kept:
                    tensor.copy_(kept[name])


def load(config: RunConfig) -> Loaded:
    """Return the base of a run; UserError where a recipe cannot train it."""
    data, labels = readable(config.data, config.objective), None
    if config.objective.task == "SEQ_CLS":
        labels = read_labels(data, config.objective.labels)
    base, tokenizer, new = load_whole(**base_arguments(config), labels=labels)
    check_base(base, tokenizer, config)
    return Loaded(base, tokenizer, labels, new if labels else ())

"""A run folder, which is all that a run leaves: what is in it, and how to load what was trained.

config.yaml       the settings with the origin of every value; itself a recipe
events.jsonl      what happened, one line an event; loss.png is drawn from it
ledger.jsonl      what became of every input row
checkpoints/      step-N, to go on from
adapter/          what was trained, in PEFT's files, with the tokenizer and chat template used
model/            in place of it after full fine-tuning: a plain transformers folder
start.safetensors an adapter's start that was found in the rows (EVA, CorDA, LoRA-GA)
evaluation.json   base beside adapter on the held-out rows; written last
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from inlay.checkpoint.folder import read_labels
from inlay.config.recipe import read_recipe
from inlay.config.resolve import Resolved, resolve
from inlay.config.schema import RunConfig
from inlay.core.errors import UserError
from inlay.methods import method_of
from inlay.train.events import Event, read_events
from inlay.train.progress import Outcome

CONFIG, EVENTS, LEDGER, EVALUATION = (
    "config.yaml",
    "events.jsonl",
    "ledger.jsonl",
    "evaluation.json",
)
ADAPTER, MODEL, CHECKPOINTS, PLOT = "adapter", "model", "checkpoints", "loss.png"
START = "start.safetensors"


class Run:
    """A view of a run folder; it holds no state of its own, so that any process may look."""

    def __init__(self, folder: str | Path) -> None:
        """Read nothing yet; `Run.open` checks that there is a run."""
        self.folder = Path(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Return the run in `folder`; UserError where there is none."""
        run = cls(Path(folder).expanduser())
        if not run.folder.is_dir():
            raise UserError(f"{folder}: there is no such folder")
        if not run.is_run:
            raise UserError(f"{folder} is no run folder: it has no {CONFIG} and no {EVENTS}")
        return run

    def __repr__(self) -> str:
        """Name the folder."""
        return f"Run({str(self.folder)!r})"

    @property
    def is_run(self) -> bool:
        """Whether a run was started here."""
        return (self.folder / CONFIG).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end, and all of it is written."""
        found = self.evaluation
        return found is not None and bool(found.get("finished")) and self.trained.is_dir()

    @cached_property
    def resolved(self) -> Resolved:
        """The settings with their origins, as config.yaml has them."""
        return resolve(read_recipe(self.folder / CONFIG))

    @property
    def config(self) -> RunConfig:
        """The settings."""
        return self.resolved.config

    @property
    def is_full(self) -> bool:
        """Whether the base itself was trained."""
        return method_of(self.config.adapter).adapter is None

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.folder / ADAPTER

    @property
    def trained(self) -> Path:
        """The folder of what was trained: the adapter, or the model after full fine-tuning."""
        return self.folder / MODEL if self.is_full else self.adapter

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What was measured on the held-out rows, base beside adapter; None before that."""
        try:
            found = json.loads((self.folder / EVALUATION).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def outcome(self) -> Outcome | None:
        """How the training ended, or was stopped last; None before that."""
        ends = [event for event in self.events() if event["event"] == "end"]
        if not ends:
            return None
        told = {k: v for k, v in ends[-1].items() if k not in ("event", "time")}
        checkpoint = self.folder / CHECKPOINTS / f"step-{told['step']}"
        return Outcome(**told, checkpoint=checkpoint if checkpoint.is_dir() else None)

    def events(self) -> list[Event]:
        """Return what happened so far."""
        path = self.folder / EVENTS
        return read_events(path) if path.is_file() else []

    def load(self, *, device: str | None = None, check_base: bool = True) -> tuple[Any, Any]:
        """Return (model, tokenizer): the base with the trained adapter, ready to generate.

        device: in place of the one it was trained on. check_base: refuse a base that is no longer
        the one it was trained on. Raises UserError where the run has trained nothing yet.
        """
        from inlay.model.heads import draw_heads, head_seed
        from inlay.model.load import load_base, load_tokenizer, load_whole
        from inlay.surface.peft_model import PeftModel

        self.require_trained()
        where, task = device or self.config.device, self.config.objective.task
        if self.is_full:
            given = {} if task == "CAUSAL_LM" else {"task_type": task}
            return load_base(self.trained, device=where, **given)
        given = base_arguments(self.config) | {"device": where}
        base, tokenizer, new = load_whole(**given, labels=read_labels(self.adapter))
        draw_heads(base, new, head_seed(self.config.train.seed))
        model = PeftModel.from_pretrained(base, self.adapter, check_base=check_base)
        return model, load_tokenizer(self.adapter) or tokenizer

    def require_trained(self) -> None:
        """Raise UserError where there is nothing trained to use."""
        if not self.trained.is_dir():
            raise UserError(
                f"{self.folder} has no {self.trained.name}/: its run has not ended; "
                f"inlay train {self.folder / CONFIG} goes on with it"
            )


def base_arguments(config: RunConfig) -> dict[str, Any]:
    """Return what `load_base` takes of a run's settings."""
    return {
        "name_or_path": config.base_model,
        "quantize": config.quantize,
        "dtype": config.dtype,
        "device": config.device,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        # left out, it is what the base is: an encoder with a decoder is then refused by name
        "task_type": None if config.objective.task == "CAUSAL_LM" else config.objective.task,
    }

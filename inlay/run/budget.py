"""How many steps of a run fit into so many seconds: a few are made and timed, in a folder aside."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from inlay.checkpoint.atomic import write_text
from inlay.config.resolve import Resolved
from inlay.run.compare_view import Watched
from inlay.run.contenders import changed
from inlay.run.loaded import Loaded
from inlay.run.training import start

STEPS, WARM = 8, 2
"""Steps that are made, and those of them that are not timed."""


def steps_in(seconds: float, name: str, folder: Path, resolved: Resolved, loaded: Loaded) -> int:
    """Return how many steps of the contender `name` fit; timed once, for all that ask again."""
    known = folder / f".{name}-{seconds:g}s"
    if not known.exists():
        steps = max(1, int(seconds / seconds_a_step(resolved, loaded)))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(known, f"{steps}\n")
    return int(known.read_text("utf-8"))


def seconds_a_step(resolved: Resolved, loaded: Loaded) -> float:
    """Return what a step of the run takes; nothing is left of the steps that were made."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "train.max_steps": STEPS,
            "train.logging_steps": 1,
            "train.save_steps": None,
            "data.eval_fraction": 0.0,
            "data.eval_path": None,
            "output_dir": str(Path(folder) / "timed"),
        }
        quiet = Watched(None, "", None)
        # scores of its own: it has no held-out rows to measure the base on
        run = start(changed(resolved, values), report=quiet, loaded=replace(loaded, scores={}))
        made = [event for event in run.events() if event["event"] == "step"][WARM:]
    return max(statistics.fmean(e["tokens"] / max(e["tokens_per_s"], 1e-9) for e in made), 1e-6)

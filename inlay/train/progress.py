"""Where a run stands, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Stopped = Literal["done", "early", "sigterm", "sigint"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. Losses are per trained token; None where there was none."""

    step: int
    total_steps: int
    stopped: Stopped
    train_loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    tokens: int
    seconds: float
    checkpoint: Path | None


@dataclass
class Progress:
    """What a checkpoint holds besides tensors: where the run stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_best: int = 0
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last line of events.jsonl."""

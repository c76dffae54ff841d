"""Where a run stands, and how it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from inlay.train.step import Sums

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
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_best: int = 0
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last line of events.jsonl."""

    def add_step(self, sums: Sums, seconds: float) -> None:
        """Count a step that was made."""
        self.step += 1
        self.tokens += sums.tokens
        self.seconds += seconds
        self.train_loss = sums.loss
        found = {"loss": sums.loss, "grad_norm": float(sums.grad_norm), "seconds": seconds}
        found |= {"steps": 1, "tokens": sums.tokens, "trained_tokens": sums.trained_tokens}
        self.window = {name: self.window.get(name, 0) + value for name, value in found.items()}

    def add_evaluation(self, loss: float, threshold: float) -> bool:
        """Count an evaluation; return whether it is the best so far, by more than `threshold`."""
        self.eval_loss = loss
        # a loss that is NaN is never the best, and no later one is compared with it
        best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss - threshold)
        if best:
            self.best_loss, self.best_step = loss, self.step
        self.evals_without_best = 0 if best else self.evals_without_best + 1
        return best

    def close_window(self) -> dict[str, float]:
        """Return the numbers of a line of events.jsonl, and begin the next one's."""
        window, self.window = self.window, {}
        return {
            "loss": window["loss"] / window["steps"],
            "grad_norm": window["grad_norm"] / window["steps"],
            "tokens": int(window["tokens"]),
            "trained_tokens": window["trained_tokens"],
            "tokens_per_s": round(window["tokens"] / max(window["seconds"], 1e-9), 1),
        }

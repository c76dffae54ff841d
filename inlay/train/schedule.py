"""The learning rate as a function of the step alone, so that a resumed run needs no state of it.

    lr(s) = peak * (s + 1) / (w + 1)            for s < w, the steps of warmup; after them, with
    p = (s - w) / (total - w):
        cosine      peak * (1 + cos(pi * p)) / 2
        linear      peak * (1 - p)
        constant    peak

Steps count from 0. The first step already moves and the last one still does: no step is wasted.
(transformers' schedules begin the warmup at 0; after it they are these.)
"""

from __future__ import annotations

import math

from inlay.train.settings import TrainConfig


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Return the learning rate of `step` (from 0) of `total`."""
    warmup = warmup_steps(total, config)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    match config.lr_scheduler:
        case "cosine":
            return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return config.learning_rate * (1 - progress)
        case "constant":
            return config.learning_rate


def warmup_steps(total: int, config: TrainConfig) -> int:
    """Return the steps of warmup of a run of `total` steps."""
    if config.warmup_steps is not None:
        return min(config.warmup_steps, total)
    return math.ceil(config.warmup_ratio * total)

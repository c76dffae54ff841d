"""Which rows a step sees: a function of the seed and the step, so that any step can be the next."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Order:
    """`rows` rows, shuffled anew each epoch, dealt to steps of `per_step`.

    The last step of an epoch may be smaller.
    """

    rows: int
    per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps to see every row once."""
        return math.ceil(self.rows / self.per_step)

    def indices(self, step: int) -> list[int]:
        """Return the rows of `step` (from 0)."""
        epoch, at = divmod(step, self.steps_per_epoch)
        return _shuffled(self.rows, self.seed, epoch)[at * self.per_step : (at + 1) * self.per_step]


def seed_of(*numbers: int) -> int:
    """Return a seed made of `numbers`, such as (seed, step); near ones are unrelated."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(rows, generator=generator).tolist()

"""What came out of a comparison: a result for each run, and each contender's best rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MEASURES: Mapping[str, tuple[str, str, bool]] = {
    "accuracy": ("accuracy", ".1%", True),
    "macro_f1": ("macro-F1", ".3f", True),
    "exact_match": ("exact match", ".1%", True),
    "loss": ("loss", ".4f", False),
}
"""Score -> its name, its format, and whether more is better; the first that a run has ranks it."""


@dataclass(frozen=True)
class Result:
    """How a contender did with one learning rate and one seed."""

    name: str
    method: str
    rate: float
    seed: int
    folder: str
    trainable: int = 0
    """Parameters that trained."""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Of training alone: no loading, no evaluation."""
    memory_mb: float | None = None
    """MiB that training took at most, over the loaded base with its adapter."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """On the held-out rows; empty where it failed."""
    test: Mapping[str, float] = field(default_factory=dict)
    """On the rows kept for the end, where there are such."""
    base: Mapping[str, float] = field(default_factory=dict)
    """What the base scores on the held-out rows."""
    failed: str = ""
    """Why there is no result."""

    @property
    def label(self) -> str:
        """Its name, rate and seed for reading."""
        return f"{self.name} lr {self.rate:g} seed {self.seed}"

    @property
    def order(self) -> float:
        """Its quality on the held-out rows, more is better; -inf where it failed."""
        ranking = measure_of([self])
        if ranking is None:
            return -math.inf
        value = self.scores[ranking]
        return value if MEASURES[ranking][2] else -value


@dataclass(frozen=True)
class Line:
    """A contender at its best learning rate: means over its seeds."""

    name: str
    method: str
    rate: float
    tried: Mapping[float, float | None]
    """Learning rate -> the ranking score of the first seed; None where it failed."""
    seeds: int
    trainable: int
    steps: int
    seconds: float
    memory_mb: float | None
    scores: Mapping[str, float]
    spread: Mapping[str, float]
    """Score -> its standard deviation over the seeds; none of a single one."""
    failed: str = ""


@dataclass(frozen=True)
class Comparison:
    """All results, and what they are results of."""

    base: str
    total: int
    """Parameters of the base, its head included."""
    train_rows: int
    held_out: int
    results: tuple[Result, ...]
    settings: Mapping[str, Any]
    """What the recipe and the command line say, by dotted key."""
    folder: str
    seconds: float | None = None
    """The budget in seconds; None where it is the recipe's steps."""
    test: str | None = None
    order: tuple[str, ...] = ()
    """The contenders' names as they were given."""

    @property
    def ranking(self) -> str:
        """The score that ranks."""
        return measure_of(self.results) or "loss"

    def best(self) -> list[Line]:
        """Return a line for each contender that has results, in the order they were given."""
        names = dict.fromkeys([*self.order, *(result.name for result in self.results)])
        found = [[one for one in self.results if one.name == name] for name in names]
        return [self._line(results) for results in found if results]

    def base_scores(self) -> Mapping[str, float]:
        """Return what the base scores on the held-out rows; empty where a test is what counts."""
        found = next((result.base for result in self.results if result.base), {})
        return {} if any(result.test for result in self.results) else found

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        told = asdict(self)
        told["results"] = [asdict(result) for result in self.results]
        return {"format": "inlay-compare-1", "best": [asdict(b) for b in self.best()], **told}

    def _line(self, results: Sequence[Result]) -> Line:
        first = max(
            (result for result in results if result.seed == results[0].seed),
            key=lambda result: result.order,
        )
        chosen = [one for one in results if one.rate == first.rate and one.scores]
        scored = [one.test or one.scores for one in chosen]
        means, spread = {}, {}
        for name in scored[0] if scored else ():
            values = [scores[name] for scores in scored if name in scores]
            means[name] = statistics.fmean(values)
            if len(values) > 1:
                spread[name] = statistics.stdev(values)
        memory = [one.memory_mb for one in chosen if one.memory_mb is not None]
        return Line(
            name=first.name,
            method=first.method,
            rate=first.rate,
            tried={
                one.rate: one.scores.get(self.ranking)
                for one in results
                if one.seed == results[0].seed
            },
            seeds=len(chosen),
            trainable=first.trainable,
            steps=first.steps,
            seconds=statistics.fmean([one.seconds for one in chosen]) if chosen else 0.0,
            memory_mb=max(memory) if memory else None,
            scores=means,
            spread=spread,
            failed=first.failed,
        )


def measure_of(results: Sequence[Result]) -> str | None:
    """Return the score that ranks `results`: the first of MEASURES that they have."""
    return next((m for m in MEASURES if any(m in result.scores for result in results)), None)

"""EVA: A holds the directions in which a layer's inputs vary most; ranks go where these tell more.

    inputs X - mean = U S V    A = V_R    B = 0    (Paischer et al., arXiv:2410.07170)

V and S are kept up to date from batch to batch (incremental principal components: Ross et al.,
2008), until V no longer turns.  Of all layers' directions, those that explain the largest share of
their layer's variance are taken, as many as there were ranks.      N tokens, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inlay.inits._search import largest

FROM_THE_BASE = False
FROM_DATA = True
ROUNDS, SEED = 4, 42


class Components:
    """The principal directions of a layer's inputs so far.

    vectors [K, I], values [K] from the largest down, shares [K] of the variance; None before there
    are as many inputs as directions. settled [K]: whether each is as it was a batch ago.
    """

    def __init__(self, count: int, tau: float) -> None:
        """Look for `count` directions; settled from a cosine of `tau` on."""
        self.count, self._tau = count, tau
        self.vectors: Tensor | None = None
        self.values = self.shares = torch.zeros(0)
        self.settled = torch.zeros(count, dtype=torch.bool)
        self._seen = 0
        self._mean = self._squares = torch.zeros(0)
        self._waiting: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Take in the inputs [N, I] of a batch; they wait while there are fewer than directions."""
        self._waiting.append(x.float())
        x = torch.cat(self._waiting)
        self.count = min(self.count, x.shape[1])
        if len(x) < self.count:
            return
        self._waiting = []
        before, rows = self.vectors, self._rows(x)
        _, s, v = largest(rows, 2 * self.count, ROUNDS, SEED)
        # the sign of a direction is free: its largest entry is positive
        v = v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
        self.vectors, self.values = v[: self.count], s[: self.count]
        self.shares = self.values.to(self._squares).square() / self._squares.sum()
        if before is not None:
            same = torch.nn.functional.cosine_similarity(self.vectors, before)
            self.settled = (same >= self._tau).cpu()

    def _rows(self, x: Tensor) -> Tensor:
        """Return what has the directions of all inputs so far: of before, of now, of the means."""
        # what MPS has not
        kind = torch.float32 if x.device.type == "mps" else torch.float64
        n, mean = len(x), x.to(kind).mean(0)
        apart = x.to(kind) - mean
        squares, total = apart.square().sum(0), self._seen + n
        rows = [apart.to(x.dtype)]
        if self.vectors is not None:
            shift = (self._seen * n / total) ** 0.5 * (self._mean - mean)
            rows = [self.values[:, None] * self.vectors, *rows, shift[None].to(x.dtype)]
            squares = squares + self._squares + shift.square()
            mean = (self._seen * self._mean + n * mean) / total
        self._seen, self._mean, self._squares = total, mean, squares
        return torch.cat(rows)


def share_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return how many directions each layer gets of the `budget` that explain most in theirs."""
    names = [name for name, own in shares.items() for _ in own]
    order = torch.cat([own.cpu() for own in shares.values()]).argsort(descending=True, stable=True)
    counts = dict.fromkeys(shares, 0)
    for at in order[:budget].tolist():
        counts[names[at]] += 1
    return counts


def leaders_first(counts: dict[str, int], groups: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the counts with the highest of each group of layers at its leader.

    Layers of one input have the same directions, and only the leader's are looked at.
    """
    found = dict(counts)
    for leader, members in groups.items():
        for member in members:
            if found[member] > found[leader]:
                found[leader], found[member] = found[member], found[leader]
    return found

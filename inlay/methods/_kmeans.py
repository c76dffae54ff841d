"""K-means, in the steps of scikit-learn's, so that groups that no file holds come out as PEFT's.

Each of K groups is a mean; each point [N] belongs to the nearest one; the means move, in rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
"""Rounds of k-means."""
DRAWN_BY = 123456789
"""Seed of its first centers: PEFT's, for its files do not say which row is in which group."""


def grouped(points: Tensor, count: int) -> Tensor:
    """Return the group [N], of `count`, of each of the points [N, D].

    They need not be even, and one may be empty where points are the same.
    """
    import numpy as np  # its generator's numbers are what the seed means

    enough = 1e-4 * points.var(0, correction=0).mean()
    points = points - points.mean(0)
    even = np.ones(len(points), dtype=np.float32) / np.float32(len(points))
    drawn = np.random.RandomState(DRAWN_BY).choice(len(points), count, replace=False, p=even)
    centers = points[torch.from_numpy(drawn)]
    labels = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        before, labels = labels, _nearest(points, centers)
        moved = _means(points, labels, centers)
        shift, centers = (moved - centers).square().sum(), moved
        if torch.equal(labels, before):
            return labels
        if shift <= enough:
            break
    return _nearest(points, centers)


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    return (centers.square().sum(1) - 2 * points @ centers.T).argmin(1)


def _means(points: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Return the mean of each group; one without a member moves to the farthest point."""
    sums = torch.zeros_like(centers).index_add(0, labels, points)
    counts = labels.bincount(minlength=len(centers)).to(points.dtype)
    empty = (counts == 0).nonzero()[:, 0]
    far = (points - centers[labels]).square().sum(1).topk(len(empty))
    for group, point, distance in zip(empty, far.indices, far.values, strict=True):
        if distance > 0:
            sums[labels[point]] -= points[point]
            counts[labels[point]] -= 1
            sums[group], counts[group] = points[point], 1
    return sums / counts.clamp(min=1)[:, None]

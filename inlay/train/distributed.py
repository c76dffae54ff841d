"""The words a step needs of torch.distributed; without a process group each is the identity.

Ranks add their gradients up (no mean): every share is divided by the count of all ranks already
(law 2), so that ranks may hold different numbers of rows, or none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number, 0 where it is alone."""
    return dist.get_rank() if _running() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _running() else 1


def add_up(value: Tensor) -> Tensor:
    """Return the sum of `value` over all ranks."""
    if _running():
        value = value.clone()
        dist.all_reduce(value)
    return value


def fill_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put 0 where a rank that trained nothing has no .grad, so that all ranks have the same."""
    for parameter in parameters if _running() else ():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def add_up_gradients(gradients: Iterable[Tensor]) -> None:
    """Put the sum over all ranks into each of `gradients`, which are the same on all."""
    for gradient in gradients if _running() else ():
        dist.all_reduce(gradient)


def gather(names: list[str]) -> list[str]:
    """Return the `names` of all ranks, in the order of ranks."""
    if not _running():
        return names
    found: list[list[str]] = [[] for _ in range(world())]
    dist.all_gather_object(found, names)
    return [name for part in found for name in part]


def wait() -> None:
    """Return when every rank has come here."""
    if _running():
        dist.barrier()

"""What of a run goes into a checkpoint's tensors and comes back, and whether it is the same run.

    weights.NAME              every trained parameter
    optimizer.KIND.NAME       its AdamW state: exp_avg, exp_avg_sq, step
    ranks.ADAPTER.NAME        what AdaLoRA remembers of each parameter, and what it has chosen

There is no random state to save: each micro-batch is seeded by the run's seed and its own number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.train import (
    Checkpoint,
    find_fault,
    newest_verified,
    prune,
    write_checkpoint,
)
from inlay.core.errors import UserError
from inlay.model.ranks import Ranks
from inlay.train.distributed import rank, wait
from inlay.train.optim import load_optimizer_tensors, optimizer_tensors
from inlay.train.progress import Progress
from inlay.train.settings import TrainConfig


class Keeper:
    """Writes the checkpoints of one run and finds the one to go on from; `saved` is its step."""

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        identity: Mapping[str, Any],
        config: TrainConfig,
        ranks: Sequence[Ranks] = (),
    ) -> None:
        """Touch nothing yet."""
        self.folder = folder / "checkpoints"
        self.parameters, self.optimizer = parameters, optimizer
        self.identity, self.config = identity, config
        self.ranks = ranks
        self.saved: int | None = None

    def restore(self, notice: Callable[[str], None]) -> Progress | None:
        """Fill weights and optimizer from the newest checkpoint that verifies; None: there is none.

        Raises UserError where that one is of another run.
        """
        found = newest_verified(self.folder, notice)
        wait()
        if found is None:
            return None
        state = found.state()
        check_same_run(found.path, state["identity"], self.identity)
        tensors = found.tensors()
        fill(self.parameters, self.optimizer, tensors)
        self._recall(tensors)
        self.saved = found.step
        return Progress(**state["progress"])

    def save(self, progress: Progress) -> Path | None:
        """Write the step where `progress` stands; None where it is written already, or by rank 0.

        Checkpoints beyond save_total_limit are removed.
        """
        if self.saved == progress.step:
            return None
        self.saved = progress.step
        path = None
        if rank() == 0:
            tensors = gather_tensors(self.parameters, self.optimizer)
            for ranks in self.ranks:
                held = ranks.state()
                tensors |= {f"ranks.{ranks.name}.{key}": value for key, value in held.items()}
            state = {"identity": self.identity, "progress": asdict(progress)}
            path = write_checkpoint(self.folder, progress.step, tensors, state).path
            keep = progress.best_step if self.config.restore_best else None
            prune(self.folder, self.config.save_total_limit, keep=keep)
        wait()
        return path

    def restore_weights(self, step: int) -> str | None:
        """Fill the weights from the checkpoint of `step`, or return what is wrong with it."""
        path = self.folder / f"step-{step}"
        fault = find_fault(path)
        if fault is None:
            tensors = Checkpoint(path, step).tensors()
            fill(self.parameters, None, tensors)
            self._recall(tensors)
        return fault

    def _recall(self, tensors: Mapping[str, Tensor]) -> None:
        for ranks in self.ranks:
            ranks.load(_under(f"ranks.{ranks.name}.", tensors))


def gather_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint."""
    weights = {f"weights.{name}": parameter.data for name, parameter in parameters.items()}
    state = optimizer_tensors(optimizer, parameters)
    return weights | {f"optimizer.{name}": value for name, value in state.items()}


def fill(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    tensors: Mapping[str, Tensor],
) -> None:
    """Copy a checkpoint's tensors into `parameters` and `optimizer` (where given).

    Raises UserError, with nothing copied, that lists every name and shape that differs.
    """
    weights = _under("weights.", tensors)
    wrong = [f"{name} is missing" for name in parameters.keys() - weights.keys()]
    wrong += [f"{name} is not trained here" for name in weights.keys() - parameters.keys()]
    wrong += [
        f"{name} is {list(weights[name].shape)}, not {list(p.shape)}"
        for name, p in parameters.items()
        if name in weights and weights[name].shape != p.shape
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:20])
        raise UserError(
            f"the checkpoint is not of this model and adapter: {shown}; "
            f"use the run's own recipe to resume"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            # copied into the memory the model has: a tensor that views the file may be aligned
            # otherwise, and matrix products may then round otherwise
            parameter.copy_(weights[name])
    if optimizer is not None:
        load_optimizer_tensors(optimizer, parameters, _under("optimizer.", tensors))


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def check_same_run(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise UserError that lists how the run of the checkpoint at `path` differs from this one."""
    differ = [
        name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)
    ]
    if not differ:
        return
    told = "; ".join(
        "the training rows are not the same"
        if name == "rows"
        else f"{name} was {theirs.get(name)}, now {ours.get(name)}"
        for name in differ
    )
    raise UserError(
        f"{path} is of a run with other settings, which it cannot go on with: {told}. "
        f"Resume with the settings of that run, or give another output_dir"
    )


def digest_rows(rows: Sequence[Any], size: Any) -> str:
    """Return a digest of which rows there are, how long each is, and in what order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.row_id} {size(row)}\n".encode())
    return digest.hexdigest()

"""One process of a training run: python distributed_run.py FOLDER RANK WORLD ACCUMULATION."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from inlay.train.events import Events
from inlay.train.loop import fit
from inlay.train.settings import TrainConfig
from tests.train.killed_run import EveryToken, Tokens, build


def main(folder: Path, rank: int, world: int, accumulation: int) -> None:
    if world > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    config = TrainConfig(
        num_epochs=2,
        micro_batch_size=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        precision="float32",
        eval_steps=1,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (8, 12), generator=generator)
    rows = [Tokens(row, f"rows.jsonl:{i + 1}") for i, row in enumerate(ids)]
    # 5 rows in steps of 4: the last step of an epoch has one row, and none for the second rank
    fit(build(), None, EveryToken(), rows[3:], rows[:3], config, folder, Events(folder))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

"""Two ranks train what one does, with ranks of unequal work and dropout on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inlay.checkpoint.train import newest_verified
from inlay.train.events import read_events

SCRIPT = Path(__file__).with_name("distributed_run.py")


def start(folder, rank, world, accumulation):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    arguments = [str(folder), str(rank), str(world), str(accumulation)]
    return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], env=environment)


@pytest.mark.slow
def test_two_ranks_of_two_micro_batches_are_one_rank_of_four(tmp_path):
    processes = [start(tmp_path / "two", rank, 2, 2) for rank in (0, 1)]
    processes.append(start(tmp_path / "one", 0, 1, 4))
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    two, one = (newest_verified(tmp_path / n / "checkpoints").tensors() for n in ("two", "one"))
    weights = [name for name in one if name.startswith("weights.")]
    for name in weights:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)
    lines = [
        [e for e in read_events(tmp_path / n / "events.jsonl") if e["event"] in ("step", "eval")]
        for n in ("two", "one")
    ]
    for ours, theirs in zip(*lines, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)

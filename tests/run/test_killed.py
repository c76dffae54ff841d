"""`inlay train` may be stopped at any moment: the same command goes on, to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inlay.cli import main
from inlay.run import Run
from tests.documents import ROOT

SCRIPT = Path(__file__).with_name("killed_command.py")


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_started_again_the_adapter_is_bit_equal(tmp_path, kills):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(kills), "11"],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{kills} of {kills}\n"), done.stderr


def test_told_to_end_it_finishes_the_step_saves_exits_with_0_and_goes_on(chats):
    line = """train --data chats.jsonl --train.max_steps 40 --train.micro_batch_size 2
        --train.precision float32 --evaluate.answers 0 --train.save_steps 1000"""
    words = line.split()
    process = subprocess.Popen(
        [sys.executable, "-m", "inlay", *words, "--output_dir", "cut"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    until(lambda: steps("cut"))
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "the same command goes on" in said
    run = Run.open("cut")
    assert (run.outcome.stopped, run.is_finished) == ("sigterm", False)
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == [
        f"step-{run.outcome.step}"
    ]

    assert main([*words, "--output_dir", "cut"]) == 0
    assert main([*words, "--output_dir", "whole"]) == 0
    assert Run.open("cut").is_finished
    adapters = [Path(f) / "adapter" / "adapter_model.safetensors" for f in ("cut", "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_told_to_end_before_the_first_step_it_exits_with_0(chats, monkeypatch, capsys):
    import inlay.run.loaded

    def told(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(inlay.run.loaded, "load_whole", told)
    assert main(["train", "--data", "chats.jsonl"]) == 0
    assert "the same command goes on" in capsys.readouterr().err
    assert not Path("runs").exists()


def steps(folder):
    run = Run(folder)
    return run.is_run and [event for event in run.events() if event["event"] == "step"]


def until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)

"""events.jsonl."""

from __future__ import annotations

import json
import math
import mmap
import resource

import pytest
import torch

from inlay.core.errors import UserError
from inlay.train.events import Events, memory_mb, read_events
from inlay.train.progress import Progress


def test_a_line_is_appended_and_told_to_the_listeners(tmp_path):
    told = []
    events = Events(tmp_path / "run", [told.append])
    events.emit("step", 1, loss=2.5, grad_norm=float("inf"))
    Events(tmp_path / "run").emit("end", 1)
    first, second = read_events(events.path)
    assert told == [first]
    assert (first["loss"], first["grad_norm"], second["event"]) == (2.5, None, "end")
    assert all(json.loads(line) for line in events.path.read_text().splitlines())


def test_rewinding_drops_later_steps_ends_and_a_torn_line(tmp_path):
    events = Events(tmp_path)
    events.emit("start", 0)
    for step in (1, 2, 3):
        events.emit("step", step)
    events.emit("end", 2)
    with open(events.path, "a") as file:
        file.write('{"event": "st')
    assert len(read_events(events.path)) == 5
    events.rewind(2)
    assert [(e["event"], e["step"]) for e in read_events(events.path)] == [
        ("start", 0),
        ("step", 1),
        ("step", 2),
    ]


def test_memory_is_that_of_this_process():
    before = memory_mb(torch.device("cpu"))
    # pages of their own: a tensor may be given memory that the process has held before
    with mmap.mmap(-1, 2**26) as held:
        held.write(b"x" * len(held))
        assert memory_mb(torch.device("cpu")) > before + 0.9 * len(held) / 2**20


def test_a_line_that_a_full_disk_cut_is_taken_back(tmp_path):
    events = Events(tmp_path)
    events.emit("start", 0)
    before = events.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(UserError, match="no space left"):
            events.emit("notice", 0, text="x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert events.path.read_bytes() == before
    events.emit("end", 0)
    assert [event["event"] for event in read_events(events.path)] == ["start", "end"]


def test_a_line_cut_in_the_middle_of_the_file_hides_no_other(tmp_path):
    events = Events(tmp_path)
    events.emit("start", 0)
    with open(events.path, "ab") as file:
        file.write(b'{"event": "st\x00\x00\xff\n')
    events.emit("step", 1)
    assert [event["event"] for event in read_events(events.path)] == ["start", "step"]
    events.rewind(0)
    assert [event["event"] for event in read_events(events.path)] == ["start"]


def test_an_evaluation_that_is_nan_is_never_the_best():
    progress = Progress(step=1)
    assert not progress.add_evaluation(math.nan, 0.0)
    progress.step = 2
    assert progress.add_evaluation(3.0, 0.0)
    assert not progress.add_evaluation(math.nan, 0.0)
    assert progress.add_evaluation(2.0, 0.0)
    assert (progress.best_loss, progress.best_step) == (2.0, 2)

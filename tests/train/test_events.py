"""events.jsonl."""

from __future__ import annotations

import json

import torch

from inlay.train.events import Events, memory_mb, read_events


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
    held = torch.ones(2**24)
    assert memory_mb(torch.device("cpu")) > before + 0.9 * held.nbytes / 2**20

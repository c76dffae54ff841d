"""What happened in a run: events.jsonl, one JSON object a line; bars and plots are views of it.

    {"event": "start", "step": 0, "steps": 120, ...}
    {"event": "step", "step": 1, "steps": 120, "epoch": 0.008, "loss": 2.31, "lr": 1e-4,
    "grad_norm": 0.7,
     "tokens": 911, "trained_tokens": 312, "tokens_per_s": 5120.0, "memory_mb": 410.2, "eta_s":
     31.0}
    {"event": "eval", "step": 60, "loss": 1.9, "perplexity": 6.7, "tokens": 4012}
    {"event": "save", "step": 100, "path": "checkpoints/step-100"}
    {"event": "notice", "step": 0, "text": "skipped ...: digest differs"}    {"event": "resume",
    "step": 100} {"event": "nonfinite", "step": 7, "loss": null, "rows": ["chats.jsonl:3"]}
    {"event": "end", "step": 120, "stopped": "done", ...}

A step is counted from 1 when it is done. Each event has "time", seconds since 1970.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from inlay.checkpoint.atomic import disk_errors, write_text

Event = dict[str, Any]


class Events:
    """Appends to folder/events.jsonl and calls every listener with the event."""

    def __init__(
        self, folder: str | Path, listeners: Iterable[Callable[[Event], None]] = ()
    ) -> None:
        """Write nothing yet."""
        self.path = Path(folder) / "events.jsonl"
        self.listeners = list(listeners)

    def emit(self, event: str, step: int, **fields: Any) -> Event:
        """Write one line and return it; a number that is not finite becomes null."""
        line = {"event": event, "step": step, "time": round(time.time(), 3), **fields}
        line = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
        }
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        for listener in self.listeners:
            listener(line)
        return line

    def rewind(self, step: int) -> None:
        """Drop what came after `step`, and a line cut by a kill: a resumed run does it again."""
        if self.path.exists():
            kept = [
                line
                for line in read_events(self.path)
                if line["step"] <= step and line["event"] != "end"
            ]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_events(path: str | Path) -> list[Event]:
    """Return the events of an events.jsonl; a last line that is not whole yet is left out."""
    lines = Path(path).read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def memory_mb(device: torch.device) -> float:
    """Return MiB: the peak of tensors on a CUDA `device`, else what this process has resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError):  # not Linux: the peak is the best the standard library knows
        return _peak_resident_mb()
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _peak_resident_mb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)

"""What happened in a run: events.jsonl, one JSON object a line; bars and plots are views of it.

    event       step        fields
    start       0           steps, rows, eval_rows, trainable, precision
    resume      as saved    the same
    step        its number  steps, epoch, loss, lr, grad_norm, tokens, trained_tokens,
                            tokens_per_s, memory_mb, eta_s
    eval        as trained  loss, perplexity, tokens, best
    save        as saved    path
    notice      any         text
    nonfinite   as trained  at, rows, text
    end         the last    stopped, total_steps, train_loss, eval_loss, best_eval_loss, ...

A step is counted from 1 when it is done. Each event has "time", seconds since 1970; losses are in
nats a trained token, and the losses of a step line are means over the steps since the last one.
"""

from __future__ import annotations

import errno
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
            _append(self.path, json.dumps(line) + "\n")
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


def _append(path: Path, line: str) -> None:
    with open(path, "ab", buffering=0) as file:
        whole = file.seek(0, os.SEEK_END)
        try:
            written = file.write(line.encode())
            if written < len(line.encode()):  # the disk took a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(whole)
            raise


def read_events(path: str | Path) -> list[Event]:
    """Return the events of an events.jsonl; lines that are not whole are left out.

    The last one may be being written, and one before it may have been cut by a power failure.
    """
    events = []
    for line in Path(path).read_text("utf-8", errors="replace").split("\n")[:-1]:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


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

"""Stop at a step's end when asked: SIGTERM, or Ctrl-C once (twice stops at once)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal


class Stop:
    """What the run was told, read once a step."""

    asked: Literal["sigterm", "sigint"] | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Collect stop signals for the length of a `with` block; what handled them before is put back.

    Outside the main thread Python allows no handler, so there nothing is collected.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: FrameType | None) -> None:
        stop.asked = "sigterm" if number == signal.SIGTERM else "sigint"
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

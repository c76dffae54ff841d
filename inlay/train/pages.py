"""Tensors of many parameters in the host's memory, of which two pages at a time are on the device.

They stand one behind another, pinned. One page is worked on while the next comes and the last goes
back, on a stream of their own. On the CPU it is the same program without streams, which saves
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from inlay.core.errors import UserError

ALIGNED = 256
"""Where a parameter begins is a multiple of this: whole blocks of 8-bit codes, whole vectors."""

Layout = Mapping[str, tuple[torch.dtype, int]]
"""What there is of each parameter: name -> its dtype, and the values that share one of its
numbers."""


class Span(NamedTuple):
    """The values [first, last) of a parameter, which stand at `at` in their page."""

    parameter: Tensor
    first: int
    last: int
    at: int


class Pages:
    """Tensors for parameters of one device and layout: zeros at first, each flat in `places`.

    page: the values of a page, a multiple of 256.
    """

    def __init__(
        self, parameters: Sequence[Tensor], layout: Layout, device: torch.device, page: int
    ) -> None:
        """Take the memory; UserError for a device other than cpu or cuda."""
        if device.type not in ("cpu", "cuda"):
            raise UserError(
                f"a paged optimizer pages to cuda (and to the cpu, to try it), not to {device}; "
                "set train.optimizer to adamw or adamw_8bit"
            )
        assert page % ALIGNED == 0
        self.layout, self.page, self.lane = layout, page, Lane(device)
        sizes = [-(-parameter.numel() // ALIGNED) * ALIGNED for parameter in parameters]
        count, pinned = sum(sizes), device.type == "cuda"
        self.host = {
            name: torch.zeros(count // share, dtype=dtype, pin_memory=pinned)
            for name, (dtype, share) in layout.items()
        }
        self.slots = [
            {
                name: torch.empty(min(page, count) // share, dtype=dtype, device=device)
                for name, (dtype, share) in layout.items()
            }
            for _ in range(2)
        ]
        self.spans: list[list[Span]] = [[] for _ in range(0, count, page)]
        self.places: dict[Tensor, dict[str, Tensor]] = {}
        start = 0
        for parameter, size in zip(parameters, sizes, strict=True):
            self._place(parameter, start)
            start += size

    def walk(
        self, wanted: Mapping[Tensor, object]
    ) -> Iterator[list[tuple[Span, dict[str, Tensor]]]]:
        """Yield for each page the spans of `wanted` parameters, with their tensors on the device.

        What is written into these by the time the next is asked for goes back to the host, and is
        there when the walk has ended.
        """
        found = [[span for span in page if span.parameter in wanted] for page in self.spans]
        turns = [number for number, spans in enumerate(found) if spans]
        self.lane.follow()
        coming = self._bring(turns, 0)
        for turn, number in enumerate(turns):
            ready, coming = coming, self._bring(turns, turn + 1)
            self.lane.let_computing_wait(ready)
            slot = self.slots[turn % 2]
            yield [(span, self._cut(slot, span)) for span in found[number]]
            self.lane.follow()
            self.lane.copy(self._page(number), slot)
        self.lane.wait()

    def _bring(self, turns: Sequence[int], turn: int) -> torch.cuda.Event | None:
        """Fetch a page into the slot of the turn before the last, which has been sent back."""
        if turn == len(turns):
            return None
        return self.lane.copy(self.slots[turn % 2], self._page(turns[turn]))

    def _page(self, number: int) -> dict[str, Tensor]:
        """Return a page in the host's memory."""
        return {
            name: self.host[name][number * self.page // share : (number + 1) * self.page // share]
            for name, (_, share) in self.layout.items()
        }

    def _cut(self, slot: Mapping[str, Tensor], span: Span) -> dict[str, Tensor]:
        count = span.last - span.first
        return {
            name: slot[name][span.at // share :][: -(-count // share)]
            for name, (_, share) in self.layout.items()
        }

    def _place(self, parameter: Tensor, start: int) -> None:
        end = start + parameter.numel()
        self.places[parameter] = self._cut(self.host, Span(parameter, start, end, start))
        for number in range(start // self.page, -(-end // self.page)):
            edge = number * self.page
            first, last = max(edge, start), min(edge + self.page, end)
            self.spans[number].append(Span(parameter, first - start, last - start, first - edge))


class Lane:
    """Copies beside the computing: on CUDA a stream; on the CPU they are done when asked for."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """Let the copies to come wait for what has been asked of the device until now."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(
        self, into: Mapping[str, Tensor], out_of: Mapping[str, Tensor]
    ) -> torch.cuda.Event | None:
        """Copy as much as both hold, after the copies before; return what tells that it is done."""
        with torch.cuda.stream(self.stream):  # None changes nothing
            for name, target in into.items():
                count = min(len(target), len(out_of[name]))
                target[:count].copy_(out_of[name][:count], non_blocking=True)
        return None if self.stream is None else self.stream.record_event()

    def let_computing_wait(self, event: torch.cuda.Event | None) -> None:
        """Let what is asked of the device from here on wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def wait(self) -> None:
        """Wait until every copy is done: the host's memory may be read, for a checkpoint."""
        if self.stream is not None:
            self.stream.synchronize()

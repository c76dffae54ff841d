"""Which adapters compute now: one object that all hosts share, so a switch is one assignment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from inlay.core.errors import UserError

BASE = "__base__"
"""The name that routes a row to the base alone."""


class Selection:
    """The active adapters of a model.

    active: the names to apply, the first one closest to the base.
    rows: for each row of the batch its adapter's name, or `__base__`; None: all rows take `active`.
    merged: the names whose weights are in the base; while there are any, no other can be chosen.
    """

    __slots__ = ("_active", "_groups", "_rows", "merged")

    def __init__(self, active: tuple[str, ...] = ()) -> None:
        """Select `active` for every row."""
        self._active = active
        self._rows: tuple[str, ...] | None = None
        self._groups: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self.merged: tuple[str, ...] = ()

    @property
    def active(self) -> tuple[str, ...]:
        """The names applied to every row; while some are merged, those."""
        return self.merged or self._active

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        if self.merged and names != self.merged:
            raise UserError(
                f"cannot select {list(names)} while {list(self.merged)} is merged into the base: "
                "call unmerge_adapter() first"
            )
        self._active = names

    @property
    def rows(self) -> tuple[str, ...] | None:
        """Each row's adapter, or None."""
        return self._rows

    @rows.setter
    def rows(self, names: Sequence[str] | None) -> None:
        if names is not None and self.merged:
            raise UserError(
                f"cannot route rows while {list(self.merged)} is merged: "
                "call unmerge_adapter() first"
            )
        self._rows = None if names is None else tuple(names)
        self._groups = {}

    @contextlib.contextmanager
    def using(
        self, *, active: tuple[str, ...] | None = None, rows: Sequence[str] | None = None
    ) -> Iterator[None]:
        """Select for a `with` block; what was selected before comes back, also after an error."""
        before = self._active, self._rows, self._groups
        try:
            if active is not None:
                self.active = active
            if rows is not None:
                self.rows = rows
            yield
        finally:
            self._active, self._rows, self._groups = before

    def alone(self, name: str) -> AbstractContextManager[None]:
        """Return the context in which every row takes the one adapter, or `__base__`."""
        return _As(self, () if name == BASE else (name,), None)

    def groups(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return for each adapter in `rows` the indices of its rows in a batch of `batch` rows.

        A batch that is a multiple of len(rows) repeats each row in place: beam search, or tokens
        folded into rows. Raises UserError where it is not a multiple.
        """
        assert self._rows is not None
        key = (batch, device)
        if key not in self._groups:
            times, rest = divmod(batch, len(self._rows))
            if rest or not times:
                raise UserError(
                    f"adapter_names has {len(self._rows)} names, but the batch has {batch} rows; "
                    "give one name a row, and leave layers that are not fed row by row (position "
                    "embeddings) out of target_modules"
                )
            members: dict[str, list[int]] = {}
            for i, name in enumerate(self._rows):
                members.setdefault(name, []).extend(range(i * times, (i + 1) * times))
            self._groups[key] = {n: torch.tensor(m, device=device) for n, m in members.items()}
        return self._groups[key]

    def checkpoint_context(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of forward and recomputation, for checkpoint(context_fn=...).

        A layer recomputed in the backward pass must see the adapters it saw in the forward pass;
        without this, a switch in between gives wrong gradients with no message.
        """
        return contextlib.nullcontext(), _As(self, self._active, self._rows)


class _As:
    """A selection for a while; may be entered any number of times, as two backward passes do."""

    def __init__(
        self, selection: Selection, active: tuple[str, ...], rows: tuple[str, ...] | None
    ) -> None:
        self._selection, self._then = selection, (active, rows)
        self._before: list[Any] = []

    def __enter__(self) -> None:
        chosen = self._selection
        self._before.append((chosen._active, chosen._rows, chosen._groups))
        (chosen._active, chosen._rows), chosen._groups = self._then, {}

    def __exit__(self, *error: object) -> None:
        chosen = self._selection
        chosen._active, chosen._rows, chosen._groups = self._before.pop()

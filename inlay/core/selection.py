"""Which adapters compute now: one object that all hosts share, so a switch is one assignment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from inlay.core.errors import UserError

BASE = "__base__"
"""The name that routes a row to the base alone."""
TASKS = "task_ids"
"""What a call says of each row's task: its number [B]."""


class Selection:
    """The active adapters of a model.

    active: the names to apply, the first one closest to the base.
    rows: for each row of the batch its adapter's name, or `__base__`; None: all rows take `active`.
    merged: the names whose weights are in the base; while there are any, no other can be chosen.
    """

    __slots__ = ("_active", "_groups", "_rows", "_said", "merged")

    def __init__(self, active: tuple[str, ...] = ()) -> None:
        """Select `active` for every row."""
        self._active = active
        self._rows: tuple[str, ...] | None = None
        self._said: Mapping[str, Tensor] = {}
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

    def said(self, name: str, x: Tensor) -> Tensor | None:
        """Return what the call says by `name` of each row of `x`, or None where it says nothing.

        As with `groups`, a batch may be a multiple of the rows that it was said of.
        """
        value = self._said.get(name)
        if value is None:
            return None
        times, rest = divmod(len(x), len(value))
        if rest or not times:
            raise UserError(f"{name} has {len(value)} rows, but the batch has {len(x)}")
        value = value.to(x.device)
        return value if times == 1 else value.repeat_interleave(times, 0)

    @contextlib.contextmanager
    def using(
        self,
        *,
        active: tuple[str, ...] | None = None,
        rows: Sequence[str] | None = None,
        said: Mapping[str, Tensor] | None = None,
    ) -> Iterator[None]:
        """Select for a `with` block; what was selected before comes back, also after an error.

        said: what a call says to the adapters beside its input, name -> a tensor of all rows.
        """
        before = self._active, self._rows, self._groups, self._said
        try:
            if active is not None:
                self.active = active
            if rows is not None:
                self.rows = rows
            if said is not None:
                self._said = {**self._said, **said}
            yield
        finally:
            self._active, self._rows, self._groups, self._said = before

    def alone(
        self, name: str, x: Tensor | None = None, index: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Return the context in which every row takes the one adapter, or `__base__`.

        x, index: the batch, and which of its rows are computed.
        """
        said = self._said
        if said and x is not None and index is not None:
            said = {key: self.said(key, x).index_select(0, index) for key in said}  # type: ignore[union-attr]
        return _As(self, () if name == BASE else (name,), None, said)

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
        return contextlib.nullcontext(), _As(self, self._active, self._rows, self._said)


class _As:
    """A selection for a while; may be entered any number of times, as two backward passes do."""

    def __init__(
        self,
        selection: Selection,
        active: tuple[str, ...],
        rows: tuple[str, ...] | None,
        said: Mapping[str, Tensor],
    ) -> None:
        self._selection, self._then = selection, (active, rows, said)
        self._before: list[Any] = []

    def __enter__(self) -> None:
        chosen = self._selection
        self._before.append((chosen._active, chosen._rows, chosen._said, chosen._groups))
        (chosen._active, chosen._rows, chosen._said), chosen._groups = self._then, {}

    def __exit__(self, *error: object) -> None:
        chosen = self._selection
        chosen._active, chosen._rows, chosen._said, chosen._groups = self._before.pop()


def task_numbers(selection: Selection | None, x: Tensor, count: int, field: str) -> Tensor:
    """Return the task of each row of `x` [B], out of `count`; with one task, no call has to say it.

    field: what the setting of the count is called, for the UserError where a call does not say it.
    """
    said = None if selection is None else selection.said(TASKS, x)
    if said is None:
        if count > 1:
            raise UserError(f"{field}={count}: say of each row which, model(..., task_ids=[0])")
        return torch.zeros(len(x), dtype=torch.long, device=x.device)
    if said.ndim != 1 or said.is_floating_point() or said.min() < 0 or said.max() >= count:
        raise UserError(
            f"task_ids={said.tolist()!s:.80} must be one number a row, from 0 to {count - 1}"
        )
    return said

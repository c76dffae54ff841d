"""Which rows evaluate and which are taken, decided by what a row says and not by where it stands.

Ranking by a hash of the content makes the choice the same on every machine and in any order of the
file, keeps copies on one side, and does not take the head of a sorted file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from inlay.core.errors import UserError
from inlay.data.rows import Row


def held_out(rows: Sequence[Row], fraction: float) -> set[str]:
    """Return the ids of the rows that evaluate: `fraction` of the distinct ones, at least one.

    Raises UserError where fewer than two rows are distinct.
    """
    if not fraction:
        return set()
    ids = sorted({row.id for row in rows}, key=lambda id: _rank("eval", id))
    if len(ids) < 2:
        raise UserError(
            f"data.eval_fraction={fraction!r} needs at least 2 different rows, not {len(ids)}; "
            "add rows or set it to 0"
        )
    return set(ids[: min(max(1, round(fraction * len(ids))), len(ids) - 1)])


def limited(rows: Sequence[Row], limit: int | None) -> set[int]:
    """Return the indices of at most `limit` rows; all of them where it is None."""
    ranked = sorted(range(len(rows)), key=lambda i: (_rank("limit", rows[i].id), i))
    return set(ranked if limit is None else ranked[:limit])


def _rank(purpose: str, id: str) -> str:
    return hashlib.sha256(f"{purpose}:{id}".encode()).hexdigest()

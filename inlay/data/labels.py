"""The classes that labeled rows name, in an order that does not depend on the rows' own."""

from __future__ import annotations

from collections.abc import Sequence

from inlay.core.errors import UserError, nearest
from inlay.data.read import read_rows
from inlay.data.rows import Labeled
from inlay.data.settings import DataConfig


def read_labels(config: DataConfig, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the classes of the rows of `config`, those that train and those that evaluate.

    given: the classes that there are, in their order; UserError for a row with another. Without
    it they are sorted, numbers by size.
    """
    rows = []
    for paths in (config.paths, config.eval_paths):
        if paths:
            rows += read_rows(
                paths,
                config.format,
                name=config.name,
                split=config.split,
                revision=config.revision,
            )[0]
    found: dict[str, None] = {}
    for row in rows:
        assert isinstance(row, Labeled), "limits.py lets only labeled rows come here"
        if given is not None and row.label not in given:
            raise row.source.error(
                f"label {row.label!r} is not one of objective.labels ({', '.join(given)})."
                f"{nearest(row.label, given)}"
            )
        found[row.label] = None
    if given is not None:
        return tuple(given)
    if len(found) < 2:
        raise UserError(
            f"{rows[0].source.file}: all rows have the label {next(iter(found))!r}; "
            "classification needs at least 2"
        )
    return tuple(sorted(found, key=_by_size))


def _by_size(label: str) -> tuple[int, int, str]:
    """Sort whole numbers by size, before names.

    >>> sorted(["10", "b", "9", "a"], key=_by_size)
    ['9', '10', 'a', 'b']
    """
    digits = label.removeprefix("-")
    is_number = digits.isascii() and digits.isdigit() and len(digits) < 19
    return (0, int(label), label) if is_number else (1, 0, label)

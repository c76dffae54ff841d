"""What became of every input row: one JSON line a row, in the order of the files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from inlay.core.errors import UserError
from inlay.data.encode import Encoded
from inlay.data.rows import Row


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fate of one row."""

    row: str
    """The row's content hash; copies share it."""
    file: str
    line: int
    split: str
    """train, eval or none."""
    outcome: str
    """kept, cut, split or dropped."""
    reason: str
    """Why it is not simply kept."""
    examples: int
    tokens: int
    trained_tokens: int

    @classmethod
    def of(cls, row: Row, split: str, encoded: Encoded) -> Entry:
        """Return the entry of `row`, encoded for `split`."""
        return cls(
            row=row.id,
            file=row.source.file,
            line=row.source.line,
            split=split if encoded.examples else "none",
            outcome=encoded.outcome,
            reason=encoded.reason,
            examples=len(encoded.examples),
            tokens=sum(len(example.input_ids) for example in encoded.examples),
            trained_tokens=sum(example.trained for example in encoded.examples),
        )


def write_ledger(path: Path, entries: Sequence[Entry]) -> None:
    """Write the entries as JSON lines, whole or not at all.

    Raises UserError where the disk is full or refuses; what stood at `path` before stays.
    """
    lines = (json.dumps(dataclasses.asdict(entry), ensure_ascii=False) + "\n" for entry in entries)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space, or give another "
            "output_dir"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def read_ledger(path: Path) -> list[Entry]:
    """Return the entries of a ledger that write_ledger wrote."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Entry(**json.loads(line)) for line in lines if line]


def reasons(entries: Sequence[Entry]) -> list[tuple[str, int]]:
    """Return why rows were dropped, the commonest first, without the figures of single rows."""
    counts = Counter(
        entry.reason.partition(" (")[0] for entry in entries if entry.outcome == "dropped"
    )
    return counts.most_common()

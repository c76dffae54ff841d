"""Rows out of files and hub data sets, each with the place where it stands."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from inlay.core.errors import UserError, nearest
from inlay.data.formats import FORMATS, recognize
from inlay.data.rows import Row, Source

Raw = tuple[dict[str, Any], Source]


def read_rows(
    paths: str | Sequence[str],
    format: str = "auto",
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> tuple[list[Row], str]:
    """Return the rows of all `paths` in order, and the name of their format.

    Files of several formats give the names joined by " + ". `name`, `split` and `revision` are for
    hub data sets. Raises UserError with file and line for the first row that cannot be read.
    """
    if format != "auto" and format not in FORMATS:
        raise UserError(
            f"data.format={format!r} is not one of auto, {', '.join(FORMATS)}."
            f"{nearest(format, FORMATS)}"
        )
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths or not all(paths):
        raise UserError("data.path is empty; give a file such as chats.jsonl or a hub data set")
    rows: list[Row] = []
    seen: dict[str, None] = {}
    for path in paths:
        found = format
        parse: Callable[[dict[str, Any], Source], Row] | None = None
        for raw, source in raw_rows(path, name=name, split=split, revision=revision):
            if parse is None:
                found = recognize(raw, source) if format == "auto" else format
                parse = FORMATS[found]
            rows.append(parse(raw, source))
        if parse is None:
            raise UserError(f"{path}: the file is empty; it needs at least one row")
        seen[found] = None
    return rows, " + ".join(seen)


def raw_rows(
    path: str, *, name: str | None = None, split: str = "train", revision: str | None = None
) -> Iterator[Raw]:
    """Yield each record of a file or hub data set as a dict with its place."""
    file = Path(path).expanduser()
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.suffix in READERS)[:5]
        hint = f"; it holds {', '.join(inside)}" if inside else " without data files"
        raise UserError(f"{path}: this is a directory{hint}; give a file, or a list of files")
    if not file.exists():
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and file.suffix not in READERS:
            return hub_rows(path, name=name, split=split, revision=revision)
        here = file.parent if file.parent.is_dir() else Path()
        raise UserError(
            f"{path}: no such file.{nearest(file.name, [p.name for p in here.iterdir()])}"
        )
    reader = READERS.get(file.suffix)
    if reader is None:
        raise UserError(
            f"{path}: {file.suffix or 'no suffix'!r} is not one of {', '.join(READERS)}"
        )
    return reader(file)


def hub_rows(
    name_or_folder: str,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Iterator[Raw]:
    """Yield the records of a data set of the hub (or a folder in its layout)."""
    import datasets

    try:
        found = datasets.load_dataset(name_or_folder, name, split=split, revision=revision)
    except Exception as error:  # the library raises a dozen kinds, network errors among them
        raise UserError(
            f"{name_or_folder}: neither a file here nor a data set that could be read from the hub "
            f"(split {split!r}): {error}"
        ) from error
    return _numbered(found, f"{name_or_folder}[{split}]")


def _jsonl(file: Path) -> Iterator[Raw]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            source = Source(str(file), number)
            text = _decoded(line, source).strip()
            if text:
                yield _object(_loads(text, source), source), source


def _json(file: Path) -> Iterator[Raw]:
    """Read an array one element at a time, so that each keeps its line."""
    text = _decoded(file.read_bytes(), Source(str(file), 1))
    at, line, decoder = 0, 1, json.JSONDecoder()

    def skip(at: int, pattern: str) -> int:
        nonlocal line
        space = re.compile(pattern).match(text, at)
        assert space is not None
        line += space.group().count("\n")
        return space.end()

    at = skip(at, r"\s*")
    if at == len(text):
        return
    if text[at] != "[":
        raise Source(str(file), line).error(
            "the file must hold an array [...] of rows; one object a line is .jsonl"
        )
    at = skip(at + 1, r"\s*")
    while at < len(text) and text[at] != "]":
        source = Source(str(file), line)
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise Source(str(file), error.lineno).error(_broken(error)) from None
        except RecursionError:
            raise source.error("the JSON is nested too deeply") from None
        yield _object(value, source), source
        line += text.count("\n", at, end)
        at = skip(end, r"\s*")
        if at < len(text) and text[at] not in ",]":
            raise Source(str(file), line).error("broken JSON: a comma is missing between two rows")
        at = skip(at, r"[\s,]*")
    if at >= len(text):
        raise Source(str(file), line).error("broken JSON: the array is not closed; is it cut off?")


def _csv(file: Path) -> Iterator[Raw]:
    # the library's limit of 131072 characters a cell is shorter than a long document
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        line = 1
        try:
            for raw in rows:
                source = Source(str(file), line + 1)
                line = rows.line_num
                if None in raw or None in raw.values():
                    raise source.error(
                        f"the row has {'more' if None in raw else 'fewer'} cells than the header"
                    )
                yield {key: _cell(value, source) for key, value in raw.items()}, source
        except (csv.Error, UnicodeDecodeError) as error:
            raise Source(str(file), rows.line_num + 1).error(f"broken CSV: {error}") from None


def _cell(value: str, source: Source) -> Any:
    """Return a list of messages or tools written as JSON in a cell as that list."""
    if value.startswith("[{") and value.endswith("}]"):
        return _loads(value, source)
    return value


def _parquet(file: Path) -> Iterator[Raw]:
    import datasets

    try:
        # streaming reads the file itself; the other way copies it to a cache first
        found = datasets.load_dataset(
            "parquet", data_files=str(file), split="train", streaming=True
        )
        yield from _numbered(found, str(file))
    except UserError:
        raise
    except Exception as error:  # Arrow's own errors, of several kinds
        raise UserError(f"{file}: cannot be read as parquet: {error}") from error


def _txt(file: Path) -> Iterator[Raw]:
    text = _decoded(file.read_bytes(), Source(str(file), 1))
    if text.strip():
        yield {"text": text}, Source(str(file), 1)


def _numbered(records: Iterable[Any], name: str) -> Iterator[Raw]:
    for number, record in enumerate(records, 1):
        # Arrow gives every struct the keys of all rows, null where a row had none
        yield {key: _without_nulls(value) for key, value in record.items()}, Source(name, number)


def _without_nulls(value: Any) -> Any:
    """Drop null keys that Arrow filled in; a message keeps its `content`, null or not."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(inner)
            for key, inner in value.items()
            if inner is not None or key in ("content", "value")
        }
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _decoded(data: bytes, source: Source) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = source.line + data.count(b"\n", 0, error.start)
        raise Source(source.file, line).error(
            f"byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from None


def _loads(text: str, source: Source) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise source.error(_broken(error)) from None
    except RecursionError:
        raise source.error("the JSON is nested too deeply") from None


def _broken(error: json.JSONDecodeError) -> str:
    return f"broken JSON at column {error.colno}: {error.msg}"


def _object(value: Any, source: Source) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise source.error(f"a row is an object {{...}}, not {json.dumps(value)[:60]}")


READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}

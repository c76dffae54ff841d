"""Rows out of files and hub data sets, each with the place where it stands."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from inlay.core.errors import UserError, nearest
from inlay.data.formats import FORMATS, LISTS, recognize
from inlay.data.jsons import json_rows, loads
from inlay.data.rows import Raw, Row, Source


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
        return _folder_rows(file, name=name, split=split, revision=revision)
    suffix = _suffix(file)
    if not file.exists():
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and suffix not in READERS:
            return hub_rows(path, name=name, split=split, revision=revision)
        here = file.parent if file.parent.is_dir() else Path()
        raise UserError(
            f"{path}: no such file.{nearest(file.name, [p.name for p in here.iterdir()])}"
        )
    if suffix not in READERS:
        raise UserError(f"{path}: {suffix or 'no suffix'!r} is not one of {', '.join(READERS)}")
    given = {"name": name, "split": None if split == "train" else split, "revision": revision}
    for field, value in given.items():
        if value is not None:
            raise UserError(
                f"data.{field} is {value!r}, but {path} is a file, which has none; it goes with "
                "data sets of the hub, so leave it out"
            )
    return _opened(file, READERS[suffix])


def _opened(file: Path, reader: Callable[[Path], Iterator[Raw]]) -> Iterator[Raw]:
    try:
        yield from reader(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


def is_data_file(name: str) -> bool:
    """Return whether `name` ends like a file that can be read, whether or not it is there."""
    return _suffix(Path(name)) in READERS


def _suffix(file: Path) -> str:
    """Return the suffix in small letters; .gz with the one before it."""
    last = file.suffix.lower()
    return "".join(file.suffixes[-2:]).lower() if last == ".gz" else last


def _folder_rows(
    folder: Path, *, name: str | None, split: str, revision: str | None
) -> Iterator[Raw]:
    """Yield the records of a folder that is laid out as on the hub, or that datasets saved."""
    held = sorted(p.name for p in folder.iterdir())
    if "dataset_dict.json" in held or "state.json" in held:
        return _saved_rows(folder, split)
    is_hub = "README.md" in held or (folder / "data").is_dir()
    files = [entry for entry in held if _suffix(folder / entry) in READERS]
    if is_hub or any(entry.endswith(".parquet") for entry in files):
        return hub_rows(str(folder), name=name, split=split, revision=revision)
    hint = f"; it holds {', '.join(files[:5])}" if files else " without data files"
    raise UserError(f"{folder}: this is a directory{hint}; give a file, or a list of files")


def _saved_rows(folder: Path, split: str) -> Iterator[Raw]:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # Arrow's errors, of several kinds
        raise UserError(f"{folder}: cannot be read as a saved data set: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{folder}: data.split={split!r} is not one of {', '.join(found)}")
        found = found[split]
    return _numbered(found, f"{folder}[{split}]")


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
    number = 0
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as lines:
            # lines end at a line feed only: JSON texts may hold U+2028 and the like
            for number, line in enumerate(lines, 1):
                source = Source(str(file), number)
                text = decoded(line, source).strip()
                if text:
                    yield _object(loads(text, source), source), source
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Source(str(file), number + 1).error(f"broken gzip: {error}") from None


def _json(file: Path) -> Iterator[Raw]:
    for value, source in json_rows(decoded(file.read_bytes(), Source(str(file), 1)), str(file)):
        yield _object(value, source), source


def _csv(file: Path) -> Iterator[Raw]:
    # the library's limit of 131072 characters a cell is shorter than a long document
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = decoded(file.read_bytes(), Source(str(file), 1))
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for raw in rows:
            source = Source(str(file), line + 1)
            line = rows.line_num
            if None in raw or None in raw.values():
                raise source.error(
                    f"the row has {'more' if None in raw else 'fewer'} cells than the header"
                )
            yield {key: _cell(key, value, source) for key, value in raw.items()}, source
    except csv.Error as error:
        raise Source(str(file), rows.line_num + 1).error(f"broken CSV: {error}") from None


def _cell(key: str, value: str, source: Source) -> Any:
    """Return the list that a cell of messages, tools or history holds as JSON; else the text."""
    if key in (*LISTS, "tools", "history") and value.lstrip().startswith("["):
        return loads(value, source)
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
    text = decoded(file.read_bytes(), Source(str(file), 1))
    if text.strip():
        yield {"text": text}, Source(str(file), 1)


def _numbered(records: Iterable[Any], name: str) -> Iterator[Raw]:
    for number, record in enumerate(records, 1):
        # Arrow gives every row and struct the keys of all, null where one had none
        given = {key: value for key, value in record.items() if value is not None}
        yield {key: _without_nulls(value) for key, value in given.items()}, Source(name, number)


def _without_nulls(value: Any) -> Any:
    """Drop null keys that Arrow filled in; a message keeps its `content`, null or not."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(inner)
            for key, inner in value.items()
            if inner is not None or key in ("content", "value")
        }
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def decoded(data: bytes, source: Source) -> str:
    """Return the text of UTF-8 `data`, which begins at `source`; raises UserError with the line."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = source.line + data.count(b"\n", 0, error.start)
        raise Source(source.file, line).error(
            f"byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from None


def _object(value: Any, source: Source) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise source.error(f"a row is an object {{...}}, not {json.dumps(value)[:60]}")


READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}

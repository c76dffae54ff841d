"""JSON with places: rows out of a JSON file one by one, each with the line where it begins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from inlay.data.formats import recognizes
from inlay.data.rows import Source

TOO_LONG = "a number has thousands of digits; write it as a text"


def loads(text: str, source: Source) -> Any:
    """Return the value of `text`, which stands at `source`; raises UserError where it is broken."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise source.error(_broken(error)) from None
    except ValueError:  # more digits than Python converts
        raise source.error(TOO_LONG) from None
    except RecursionError:
        raise source.error("the JSON is nested too deeply") from None


def json_rows(text: str, file: str) -> Iterator[tuple[Any, Source]]:
    """Yield the rows of a JSON text.

    It holds an array of rows, an object of which one value is an array of objects (as some exports
    wrap theirs), or objects one after another (JSON lines under another suffix).
    """
    cursor = _Cursor(text, file)
    if cursor.done():
        return
    if cursor.sees("["):
        yield from cursor.array()
    else:
        first, source = cursor.value()
        wrapped = [] if recognizes(first) else _lists_of_objects(first)
        if cursor.done() and len(wrapped) == 1:
            yield from _unwrapped(_Cursor(text, file), wrapped[0])
            return
        if len(wrapped) > 1:
            raise source.error(
                f"the object holds {len(wrapped)} lists ({', '.join(wrapped)}), and any may be the "
                "rows; write the one that is meant into a file of its own"
            )
        yield first, source
        while not cursor.done():
            yield cursor.value()
    if not cursor.done():
        raise cursor.source.error("broken JSON: something follows the end of the array")


def _lists_of_objects(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return []
    return [
        key
        for key, inner in value.items()
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner)
    ]


def _unwrapped(cursor: _Cursor, key: str) -> Iterator[tuple[Any, Source]]:
    """Yield the rows of the array under `key`; the object is known to be sound."""
    cursor.skip(r"\{\s*")
    while True:
        name, _ = cursor.value()
        cursor.skip(r":\s*")
        if name == key:
            yield from cursor.array()
            return
        cursor.value()
        cursor.skip(r",\s*")


class _Cursor:
    """A place in a JSON text, always before something that is not whitespace."""

    def __init__(self, text: str, file: str) -> None:
        self.text, self.file = text, file
        self.at, self.line = 0, 1
        self.decoder = json.JSONDecoder()
        self.skip(r"\s*")

    def done(self) -> bool:
        """Return whether nothing is left."""
        return self.at >= len(self.text)

    @property
    def source(self) -> Source:
        """The place."""
        return Source(self.file, self.line)

    def sees(self, characters: str) -> bool:
        """Return whether one of `characters` is next."""
        return not self.done() and self.text[self.at] in characters

    def skip(self, pattern: str) -> None:
        """Go behind what `pattern` matches here."""
        found = re.compile(pattern).match(self.text, self.at)
        if found is not None:
            self._move(found.end())

    def value(self) -> tuple[Any, Source]:
        """Return the value that begins here and its place; go behind it."""
        source = self.source
        try:
            value, end = self.decoder.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise Source(self.file, error.lineno).error(_broken(error)) from None
        except ValueError:
            raise source.error(TOO_LONG) from None
        except RecursionError:
            raise source.error("the JSON is nested too deeply") from None
        self._move(end)
        self.skip(r"\s*")
        return value, source

    def array(self) -> Iterator[tuple[Any, Source]]:
        """Yield the values of the array that begins here; go behind it."""
        self.skip(r"\[\s*")
        while not self.done() and not self.sees("]"):
            yield self.value()
            if not self.done() and not self.sees(",]"):
                raise self.source.error("broken JSON: a comma is missing between two rows")
            self.skip(r",\s*")
        if self.done():
            raise self.source.error("broken JSON: the array is not closed; is it cut off?")
        self.skip(r"\]\s*")

    def _move(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end


def _broken(error: json.JSONDecodeError) -> str:
    return f"broken JSON at column {error.colno}: {error.msg}"

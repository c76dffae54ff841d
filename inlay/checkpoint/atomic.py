"""Write a file or a folder whole or not at all: beside its place, fsync, one rename.

A reader (and a run that was killed) finds the old content or the new one, never a part. What is
being written has a name of the form `.NAME.PID.partial`; one left behind by a process that is gone
is removed by the next writer.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inlay.core.errors import UserError

_PARTIAL = re.compile(r"^\.(?P<name>.+)\.(?P<pid>\d{1,9})\.(?P<kind>partial|old)$")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def write_text(path: str | Path, text: str) -> None:
    """Put `text` (UTF-8) into `path`, whole or not at all.

    Raises UserError where the disk is full or refuses.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Put `content` into `path`, whole or not at all.

    Raises UserError where the disk is full or refuses.
    """
    path = Path(path)
    partial = _beside(path, "partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _fsync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; on a clean exit it stands at `path`, else nothing does.

    `replace`: a folder that stands at `path` already is exchanged for the new one (all of it: files
    that only the old one had are gone); otherwise a non-empty one raises UserError before anything
    is written.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_partials(path.parent)
        if path.is_file() or (path.is_dir() and not replace and any(path.iterdir())):
            raise UserError(f"{path} exists already; remove it or give another folder")
        partial = _beside(path, "partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            yield partial
            _fsync_tree(partial)
            _put_in_place(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """Remove the folder at `path`; killed half way, nothing of it stands at `path`."""
    partial = _beside(Path(path), "partial")
    os.replace(path, partial)
    shutil.rmtree(partial, ignore_errors=True)


def clean_partials(folder: str | Path) -> None:
    """Remove what killed writers left in `folder`; put back an old one not replaced after all."""
    for left in sorted(Path(folder).glob(".*")):
        match = _PARTIAL.match(left.name)
        if match is None or _alive(int(match["pid"])):
            continue
        place = left.with_name(match["name"])
        if match["kind"] == "old" and not place.exists():
            with suppress(FileNotFoundError):  # another rank has put it back
                os.replace(left, place)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk, met writing `path`, into a UserError; other errors pass."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number in _FULL:
            raise UserError(
                f"no space left on the disk of {path} ({os.strerror(number)}); "
                f"nothing was written there. "
                f"Free some space, or choose another folder"
            ) from error
        if number in _REFUSED:
            raise UserError(
                f"cannot write {path}: {os.strerror(number)}; choose another folder"
            ) from error
        raise


def _errno(error: BaseException) -> int:
    """Return the number of the operating system's error behind `error`, or 0."""
    if isinstance(error, OSError):
        return error.errno or 0
    # safetensors writes from Rust and reports an I/O error as text: "... (os error 28)"
    found = (
        re.search(r"os error (\d+)", str(error))
        if type(error).__name__ == "SafetensorError"
        else None
    )
    return int(found.group(1)) if found else 0


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _put_in_place(partial: Path, path: Path) -> None:
    old = _beside(path, "old")
    had_one = path.is_dir()
    if had_one:
        # rename(2) refuses a target that is not empty; `clean_partials` puts this one back if we
        # die in between
        os.replace(path, old)
    try:
        os.replace(partial, path)
    except OSError:
        if had_one:
            os.replace(old, path)
        raise
    _fsync_folder(path.parent)
    if had_one:
        shutil.rmtree(old, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for at, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(at) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _fsync_folder(Path(at))


def _fsync_folder(folder: Path) -> None:
    # some file systems (and Windows) cannot open or sync a folder; the rename itself stays atomic
    # there
    with suppress(PermissionError, OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # we write one folder at a time: what bears our id is a killed namesake's
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""What stands in the folder that a run is to write to: nothing, the same run, or something else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from inlay.checkpoint.atomic import clean_partials, disk_errors, remove_folder
from inlay.config.resolve import Resolved
from inlay.config.schema import RunConfig
from inlay.core.errors import UserError
from inlay.run.folder import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    EVENTS,
    LEDGER,
    MODEL,
    PLOT,
    START,
    Run,
)
from inlay.train.settings import PAGED

FREE = {
    "output_dir",
    "evaluate.shown",
    "train.eval_batch_size",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
}
"""Settings that may change between two starts of a run: they change no result."""

# config.yaml last: as long as it stands, the folder is known for what it is
_OURS = (EVALUATION, ADAPTER, MODEL, CHECKPOINTS, PLOT, EVENTS, LEDGER, START, CONFIG)


def look(run: Run, resolved: Resolved, *, overwrite: bool) -> Literal["new", "begun", "finished"]:
    """Return how far the run of these settings has come in its folder.

    Raises UserError where the folder holds something else.
    """
    if run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"output_dir {run.folder} is a file; give another output_dir")
    if overwrite:
        return "new"
    if not run.is_run:
        # a ledger alone is what a start leaves that found no row to train
        found = [name for name in _OURS if name != LEDGER and (run.folder / name).exists()]
        if found:
            raise UserError(
                f"{run.folder} holds {', '.join(found)} but no {CONFIG} that says of what; "
                "give another output_dir, or --overwrite to replace them"
            )
        return "new"
    differ = _differences(run, resolved)
    if differ:
        raise UserError(
            f"{run.folder} holds a run with other settings: {'; '.join(differ)}. "
            "Give another output_dir, or --overwrite to start anew there"
        )
    if not run.is_finished:
        return "begun"
    changed = changed_files(run, resolved.config)
    if changed:
        raise UserError(
            f"{', '.join(changed)} changed since the run in {run.folder}. "
            "Give another output_dir, or --overwrite to start anew there"
        )
    return "finished"


def digests(config: RunConfig) -> dict[str, str]:
    """Return the SHA-256 of every data file that lies on this machine, by its whole path."""
    found = {}
    for name in (*config.data.paths, *config.data.eval_paths):
        path = Path(name).expanduser().absolute()
        if path.is_file():
            with path.open("rb") as file:
                found[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def changed_files(run: Run, config: RunConfig) -> list[str]:
    """Return the data files that are not what they were when the run measured its base."""
    before = (run.evaluation or {}).get("data") or {}
    return [path for path, now in digests(config).items() if before.get(path, now) != now]


def clear(run: Run) -> None:
    """Remove what an earlier run wrote; what else lies in the folder stays."""
    for name in _OURS:
        path = run.folder / name
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Make and hold `folder` for this process; UserError where another one trains there."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            # on the folder itself: it leaves no file, and ends with the process however that ends
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {folder}; wait for it, or give another output_dir"
            ) from None
        clean_partials(folder)
        yield
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Return whether a process trains in `folder` now."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def no_junk(folder: Path) -> Iterator[None]:
    """Where the block fails, leave no folder behind that was not there and holds nothing but air.

    A ledger stays: it tells which rows were dropped, and why.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()  # refuses a folder that holds anything
        raise


def _differences(run: Run, resolved: Resolved) -> list[str]:
    try:
        theirs = run.resolved.values
    except UserError as error:
        raise UserError(
            f"{run.folder} holds a run whose settings cannot be read: {error}. "
            "Give another output_dir, or --overwrite to start anew there"
        ) from None
    ours = resolved.values
    names = [name for name in dict.fromkeys((*ours, *theirs)) if name not in FREE]
    return [
        f"{name} was {theirs.get(name)!r}, now {ours.get(name)!r}"
        for name in names
        if _meant(name, theirs) != _meant(name, ours)
    ]


def _meant(name: str, values: Mapping[str, Any]) -> Any:
    value = values.get(name)
    # where its moments lie changes no result
    return str(value).removeprefix(PAGED) if name == "train.optimizer" else value

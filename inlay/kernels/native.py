"""C sources of this package as functions: compiled once into a cache of the user's, where one can.

Everything that is compiled has an eager twin, so that a machine without a compiler computes the
same, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = (
    *("-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-std=gnu11"),
    # no fused multiply-adds: a product and a sum are each rounded, as torch rounds them
    "-ffp-contract=off",
    # these change no result, but let a loop with a comparison or a root in it become vectors
    *("-fno-trapping-math", "-fno-math-errno", "-fopenmp-simd"),
)
SECONDS = 60
"""Time a compiler may take."""


@cache
def library(name: str) -> ctypes.CDLL | None:
    """Return the compiled `name`.c, or None where it cannot be compiled or `INLAY_NATIVE` is 0.

    None too where a source that is not for this processor defines `inlay_unfit` and nothing else.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None or os.name != "posix" or os.environ.get("INLAY_NATIVE") == "0":
        return None
    try:
        path = _compiled(HERE / f"{name}.c", compiler)
        found = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    return None if hasattr(found, "inlay_unfit") else found


def _compiled(source: Path, compiler: str) -> Path:
    """Return the shared object of `source` for this machine, compiling it where it is not there."""
    text = source.read_bytes() + b"".join(h.read_bytes() for h in sorted(HERE.glob("*.h")))
    told = "\0".join([compiler, _version(compiler), _machine(), *FLAGS]).encode()
    folder = _folder()
    path = folder / f"{source.stem}-{hashlib.sha256(text + told).hexdigest()[:24]}.so"
    if path.is_file() and _is_ours(path):
        return path
    handle, made = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *FLAGS, "-o", made, str(source), "-lm"],
            check=True,
            capture_output=True,
            timeout=SECONDS,
        )
        os.chmod(made, 0o500)
        os.replace(made, path)  # whole or not at all: another process may look for it now
    finally:
        Path(made).unlink(missing_ok=True)
    return path


def _folder() -> Path:
    """Return the user's own folder for compiled code: one that others can write to is refused."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlay" / "kernels"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_ours(root):
        raise OSError(f"{root} belongs to another user, or others may write to it")
    return root


def _is_ours(path: Path) -> bool:
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _version(compiler: str) -> str:
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS)
    return told.stdout.partition("\n")[0]


def _machine() -> str:
    """Return what the machine's processor can do, for code made for another may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(os.uname())
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")

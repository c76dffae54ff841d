"""What a command sets of the machine before torch is loaded, and what `inlay info` tells of it.

The OpenMP library reads its environment once, when torch loads it. By default a thread that has
nothing to do goes on asking for work, which on a shared machine keeps those that have work from
running; asleep, it costs microseconds to wake, so it asks a thousand times and sleeps then
(docs/decisions/0013). oneDNN, and torch's own layer
over it, keep the programs of the last 1,024 products each, and a product of another number of
tokens is another one: of a run's steps up to a gigabyte (docs/decisions/0020).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

WAIT, ASKS, THREADS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"
KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
PRODUCTS = 64
"""How many products' programs each of KEPT holds; a step of a decoder has about 60."""
CPU, CGROUP = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Flags of /proc/cpuinfo that say which arithmetic a processor has units for."""


def settle(environment: MutableMapping[str, str] = os.environ) -> str:
    """Set what is not set in `environment`, and return one line about it; "" where nothing was.

    Nothing is set once torch is loaded, which would not see it.
    """
    if "torch" in sys.modules:
        return ""
    waiting = {WAIT: "passive", ASKS: "1000"}
    wanted = {**waiting, THREADS: str(cores()), **dict.fromkeys(KEPT, str(PRODUCTS))}
    if WAIT in environment:  # which says how often too
        del wanted[ASKS]
    # several processes on this machine share its cores out between them (torchrun)
    if "LOCAL_WORLD_SIZE" in environment:
        del wanted[THREADS]
    made = {name: value for name, value in wanted.items() if name not in environment}
    environment.update(made)
    told = ", ".join(f"{name} {value}" for name, value in made.items())
    return f"set for this machine: {told}" if told else ""


def cores() -> int:
    """Return the cores that this process may use: two threads of one core count once.

    A container's share of time counts too (cgroups, versions 1 and 2), which torch does not heed.
    """
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if mine is None:
        return os.cpu_count() or 1
    own = {_read(CPU / f"cpu{n}" / "topology" / "thread_siblings_list") or str(n) for n in mine}
    return max(1, math.ceil(min(len(own), _share())))


def processor() -> tuple[str, list[str]]:
    """Return the processor's name and those of FEATURES that it has; ("unknown", []) not on Linux.

    Raises nothing.
    """
    found: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    flags = (found.get("flags") or found.get("Features") or "").split()
    return found.get("model name", "unknown"), [flag for flag in FEATURES if flag in flags]


def _share() -> float:
    """Return the processors' time a second that the container may take."""
    quota, _, period = _read(CGROUP / "cpu.max").partition(" ")
    if not period:
        quota = _read(CGROUP / "cpu" / "cpu.cfs_quota_us")
        period = _read(CGROUP / "cpu" / "cpu.cfs_period_us")
    try:
        share = float(quota) / float(period)
    except ValueError:  # "max", or no such file
        return math.inf
    return share if share > 0 else math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""

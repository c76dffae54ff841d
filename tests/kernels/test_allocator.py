"""Freed blocks go back to the system, where the C library can be told so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from inlay.kernels import allocator

MEASURE = """
import sys, torch
from inlay.kernels import allocator
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
fixed = sys.argv[1] == "fixed" and allocator.return_freed()
held = []
for size in range(6, 30):  # MiB: each freed block lets glibc keep larger ones
    block = torch.ones(size << 18)
    held.append(torch.ones(1 << 16))  # a small one that stays keeps the heap's end from shrinking
    del block
before = resident()
blocks = [torch.ones(20 << 18) for _ in range(8)]
pins = [torch.ones(1000) for _ in range(8)]
del blocks
print(fixed, resident() - before)
"""


def grown(how: str) -> tuple[bool, float]:
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, how], capture_output=True, text=True, check=True
    ).stdout.split()
    return told[0] == "True", float(told[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what Linux tells of memory")
def test_large_blocks_leave_nothing_behind() -> None:
    fixed, left = grown("fixed")
    if not fixed:
        pytest.skip("this C library has no such threshold")
    assert left < 10  # of 160 MiB that were taken and freed


def test_a_threshold_of_the_users_own_stays(monkeypatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    assert not allocator.return_freed()

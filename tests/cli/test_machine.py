"""What a command sets of the machine, and that torch sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inlay.cli import _machine, info
from inlay.kernels import elementwise, gpu, linear_cross_entropy
from tests.cli.conftest import SMALL

SETTLED = (
    "from inlay.cli._machine import settle; print(settle());"
    "import torch; print(torch.get_num_threads())"
)
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SET = (*WAITING, "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", *_machine.KEPT)
GROWN = """
import torch
from pathlib import Path
from torch.nn.functional import linear

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

weight, x = torch.ones(256, 256, dtype=torch.bfloat16), torch.ones(500, 256, dtype=torch.bfloat16)
with torch.no_grad():
    linear(x[:99], weight)
    before = resident()
    for tokens in range(100, 500):
        linear(x[:tokens], weight)
print(resident() - before)
"""
"""Prints the MiB that products of 400 numbers of tokens leave behind."""


def alone(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Return what Python says in a process whose environment sets nothing of the machine."""
    kept = {name: value for name, value in os.environ.items() if name not in SET}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**kept, **environment},
    )


def test_torch_runs_as_was_settled_before_it_was_loaded():
    ran = alone("-c", SETTLED, OMP_DISPLAY_ENV="verbose")
    cores = _machine.cores()
    told = "set for this machine: OMP_WAIT_POLICY passive, GOMP_SPINCOUNT 1000, "
    told += f"OMP_NUM_THREADS {cores}, "
    told += ", ".join(f"{name} {_machine.PRODUCTS}" for name in _machine.KEPT)
    assert ran.stdout.splitlines() == [told, str(cores)]
    # what the OpenMP library itself has read
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in ran.stderr
    assert "GOMP_SPINCOUNT = '1000'" in ran.stderr


def test_what_the_user_has_set_stays():
    given = {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "1"}
    given |= dict.fromkeys(_machine.KEPT, "8")
    ran = alone("-c", SETTLED, OMP_DISPLAY_ENV="true", **given)
    assert ran.stdout.splitlines() == ["", "1"]
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in ran.stderr


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, [*WAITING, "OMP_NUM_THREADS", *_machine.KEPT]),
        ({"OMP_NUM_THREADS": "1"}, [*WAITING, *_machine.KEPT]),
        (dict.fromkeys(("OMP_NUM_THREADS", "OMP_WAIT_POLICY", *_machine.KEPT), "1"), []),
        ({"LOCAL_WORLD_SIZE": "2"}, [*WAITING, *_machine.KEPT]),
    ],
)
def test_only_what_is_not_set_is_set(monkeypatch, environment, told):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    before = dict(environment)
    line = _machine.settle(environment)
    assert [name for name in environment if name not in before] == told
    assert {name: environment[name] for name in before} == before
    assert all(name in line for name in told)
    assert bool(line) == bool(told)


def test_once_torch_is_loaded_nothing_is_set():
    import torch  # noqa: F401

    environment: dict[str, str] = {}
    assert (_machine.settle(environment), environment) == ("", {})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux counts")
def test_products_of_ever_other_numbers_of_tokens_leave_less_behind():
    unset, settled = (
        int(alone("-c", first + GROWN, OMP_NUM_THREADS="1").stdout.split()[-1])
        for first in ("", "from inlay.cli._machine import settle; print(settle())\n")
    )
    if unset < 64:
        pytest.skip("torch keeps little of a product here")
    assert settled < unset / 2


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"cpu.max": "max 100000"}, 4),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_cores_are_those_of_the_container_and_a_pair_of_threads_is_one(
    tmp_path, monkeypatch, files, cores
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(_machine, "CPU", tmp_path / "cpus")
    monkeypatch.setattr(_machine, "CGROUP", tmp_path)
    for n in range(8):
        files = {**files, f"cpus/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert _machine.cores() == cores


@pytest.mark.slow
def test_train_says_in_one_line_what_it_set(place: Path):
    ran = alone("-m", "inlay", "train", "--data", "chats.jsonl", *SMALL, "--json")
    events = [json.loads(line) for line in ran.stdout.splitlines()]
    told = [e["text"] for e in events if e["event"] == "notice" and "machine" in e["text"]]
    assert len(told) == 1
    assert "OMP_WAIT_POLICY passive" in told[0]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["info", "--help"]])
def test_help_loads_no_torch_and_no_transformers(words):
    code = (
        f"import sys; from inlay.cli import main; main({words!r});"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert alone("-c", code).stdout.splitlines()[-1] == "[]"


def test_info_tells_the_processor_the_kernels_and_how_threads_wait():
    found = json.loads(alone("-m", "inlay", "info", "--json").stdout)
    assert found["idle threads"] == "OMP_WAIT_POLICY passive"
    assert found["cores"].endswith(f"({_machine.cores()} threads)")
    assert found["processor"].startswith(_machine.processor()[0])
    assert any("nf4" in line for line in found["kernels"])


def test_info_tells_which_kernels_a_gpu_uses(monkeypatch):
    asked = []

    def triton_for(device, dtype):
        asked.append((str(device), dtype))
        return object()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info._kernels_on_the_gpu() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    for module in (gpu, elementwise, linear_cross_entropy):
        monkeypatch.setattr(module, "triton_for", triton_for)
    assert info._kernels_on_the_gpu() == ["Triton on cuda:1: nf4, elementwise, cross_entropy"]
    assert asked == [("cuda:1", torch.float16)] * 3
    monkeypatch.setattr(elementwise, "triton_for", lambda device, dtype: None)
    assert info._kernels_on_the_gpu() == [
        "Triton on cuda:1: nf4, cross_entropy",
        "plain torch on cuda:1: elementwise",
    ]

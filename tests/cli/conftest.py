"""The command line within this process, in an empty current folder with a file of chats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inlay.cli import main

SMALL = [
    *("--train.max_steps", "2", "--train.micro_batch_size", "2", "--data.eval_fraction", "0.25"),
    *("--evaluate.answers", "2", "--evaluate.max_new_tokens", "4"),
    # in which a run's fast paths and the plain ones of `eval` say the same
    *("--train.precision", "float32"),
]


def chat(question: str, answer: Any, **more: Any) -> str:
    """Return a line of a chat file."""
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    return json.dumps({"messages": said}) + "\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder with chats.jsonl the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    rows = [chat(f"Where is order {i}?", f"In {('Oslo', 'Lima')[i % 2]}.") for i in range(12)]
    Path("chats.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def inlay(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return `inlay(*words)`, which runs a command and returns (exit code, output, errors)."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of two steps, which no test may change."""
    from inlay.run import train

    folder = tmp_path_factory.mktemp("trained")
    rows = [chat(f"Where is order {i}?", f"In {('Oslo', 'Lima')[i % 2]}.") for i in range(12)]
    (folder / "chats.jsonl").write_text("".join(rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "data": {"path": str(folder / "chats.jsonl"), "eval_fraction": 0.25},
        "train": {
            "max_steps": 2,
            "micro_batch_size": 2,
            "learning_rate": 0.01,
            "precision": "float32",
        },
        "evaluate": {"answers": 2, "max_new_tokens": 4},
        "output_dir": str(folder / "run"),
    }
    return train(settings).folder

"""Small runs of the embedded base, in an empty current folder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inlay.run.report import JsonLines

SETTINGS: dict[str, Any] = {
    "data": {"path": "chats.jsonl", "eval_fraction": 0.25},
    "adapter": {"r": 2, "lora_dropout": 0.1},
    "train": {
        "max_steps": 4,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 1,
        "eval_steps": 2,
        "precision": "float32",
    },
    "evaluate": {"answers": 2, "max_new_tokens": 4},
    "output_dir": "run",
}


class Told(JsonLines):
    """Keeps what a run told, as events."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]  # type: ignore[attr-defined]

    def texts(self) -> str:
        return "\n".join(e["text"] for e in self.events if e["event"] == "notice")


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the current one, with a file of 16 chats in it, and return the file."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Where is order {i}?"},
                {"role": "assistant", "content": f"In {('Oslo', 'Lima')[i % 2]}."},
            ]
        }
        for i in range(16)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def start(chats: Path) -> Callable[..., Any]:
    """Return `start(**settings)`: it trains SETTINGS, these before, and returns (run, told)."""
    from inlay.run import train

    def start(overwrite: bool = False, **settings: Any) -> Any:
        told = Told()
        return train(SETTINGS, overwrite=overwrite, report=told, **settings), told

    return start

"""Markdown documents as programs: their fenced blocks, and a workplace to run them in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block, the line on which it opens, and why it is not run ("" where it is)."""

    language: str
    text: str
    line: int
    reason: str


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a document, in its order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(
            language=found["language"],
            text=found["text"],
            line=text.count("\n", 0, found.start("language")) + 1,
            reason=found["reason"] or "",
        )
        for found in _BLOCK.finditer(text)
    ]


def run_python(arguments: Sequence[str], folder: Path) -> str:
    """Run this interpreter in `folder` and return what it printed; fail with its errors."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, f"{arguments} ended with {ran.returncode}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def write_chats(path: Path, rows: int = 16) -> None:
    """Write a small chat file, as the documents suppose one."""
    cities = ("Oslo", "Lima", "Cairo", "Quito")
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            city = cities[i % len(cities)]
            chat = [
                {"role": "user", "content": f"Where is order {i}?"},
                {"role": "assistant", "content": f"In {city}."},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")


def write_labeled(path: Path, rows: int = 16) -> None:
    """Write a small file of labeled rows, as the documents suppose one."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            row = {"text": f"Order {i} is {('late', 'here')[i % 2]}.", "label": "ab"[i % 2]}
            file.write(json.dumps(row) + "\n")

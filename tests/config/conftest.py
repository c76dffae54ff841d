"""A place for recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return `write(text)`, which puts a recipe.yaml into the current, empty folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = Path("recipe.yaml")
        path.write_text(text, encoding="utf-8")
        return path

    return write

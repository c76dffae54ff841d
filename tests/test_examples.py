"""Every example runs as it stands, in an empty folder, and fits a screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documents import ROOT, run_python

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    run_python([str(example)], tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_under_sixty_lines(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60

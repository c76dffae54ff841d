"""docs/methods.md says what the laws find, and nothing else."""

from __future__ import annotations

from inlay.methods import names
from tests.laws import methods_table


def test_the_page_is_what_the_laws_find() -> None:
    told = methods_table.PAGE.read_text(encoding="utf-8").splitlines()
    assert told == methods_table.write().splitlines(), (
        "docs/methods.md is out of date: run `python -m tests.laws.methods_table`"
    )


def test_every_method_has_a_page_of_its_own() -> None:
    pages = {page.stem for page in (methods_table.PAGE.parent / "methods").glob("*.md")}
    assert pages >= set(names()), "docs/methods/NAME.md is missing"

"""The README and the documents hold: their blocks are run, in order, with a budget of two steps."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from inlay.config.resolve import resolve_python
from tests.documents import ROOT, Block, blocks, run_python, write_chats, write_labeled

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
]
BUDGET = {"max_steps": 2, "num_epochs": 1}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_blocks_of_a_document_run(document: Path, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl")
    write_labeled(tmp_path / "labeled.jsonl")
    for block in blocks(document):
        if not block.reason:
            check(block, tmp_path)


def check(block: Block, folder: Path) -> None:
    """Run or read one block in `folder`; a block of a language that is not known is an error."""
    match block.language:
        case "python":
            script = folder / f"line_{block.line}.py"
            script.write_text(block.text, encoding="utf-8")
            run_python([script.name], folder)
        case "yaml":
            recipe = yaml.safe_load(block.text)
            recipe["train"] = recipe.get("train", {}) | BUDGET
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
            resolve_python(recipe, {})  # every key is known, and every value fits it
        case "sh":
            for line in block.text.splitlines():
                run_line(shlex.split(line, comments=True), folder)
        case "text":
            pass
        case "json":
            for line in block.text.splitlines():
                json.loads(line)
        case _:
            raise AssertionError(f"line {block.line}: what is a block of {block.language!r}?")


def run_line(words: list[str], folder: Path) -> None:
    """Run one line of a shell block, which is an `inlay` command or a comment."""
    if words:
        assert words[0] == "inlay", f"only `inlay` is run here, not {words}; say why it is not run"
        budget = ["--train.max_steps", "2"] if words[1] == "train" else []
        run_python(["-m", *words, *budget], folder)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_of_a_document_lead_to_files(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = [part.split(")")[0].split("#")[0] for part in text.split("](")[1:]]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_a_yaml_block_of_the_readme_names_only_keys_of_the_schema(tmp_path: Path) -> None:
    found = [block for block in blocks(ROOT / "README.md") if block.language == "yaml"]
    assert found, "the README shows a recipe"

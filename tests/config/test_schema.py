"""The keys of a recipe, frozen: a change here is a change for every user."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

from inlay.config.reference import blocks, to_markdown, told
from inlay.config.schema import EvaluateConfig, RunConfig, keys

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_blocks_have_these_names():
    names = """base_model revision trust_remote_code dtype device quantize autocast_adapter_dtype
        adapter data objective train evaluate output_dir"""
    assert {field.name for field in dataclasses.fields(RunConfig)} == set(names.split())
    assert {f.name for f in dataclasses.fields(EvaluateConfig)} == {
        "answers",
        "max_new_tokens",
        "shown",
    }


def test_the_page_of_all_keys_is_the_one_the_schema_writes():
    page = PAGE.read_text(encoding="utf-8")
    assert to_markdown() in page, (
        "python -c 'from inlay.config.reference import *; print(to_markdown())'"
    )


def test_a_setting_that_not_all_methods_have_names_those_that_do():
    texts = {key.name: told(key) for _, inside in blocks() for key in inside}
    assert "lora" in texts["adapter.use_rslora"].rpartition("[")[2]
    assert "prompt_tuning" in texts["adapter.target_modules"].rpartition("[not ")[2]
    assert not texts["train.seed"].endswith("]")
    adapter = [name for name in texts if name.startswith("adapter.")]
    own = [name for name, key in keys().items() if key.block == "adapter" and key.shown]
    assert adapter[: len(own)] == own


def test_the_schema_itself_needs_no_torch():
    code = "import sys, inlay.config.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

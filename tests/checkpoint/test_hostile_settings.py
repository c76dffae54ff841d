"""An adapter folder of any method may say anything: each field is set to what it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import inlay
from inlay.checkpoint.folder import CONFIG, OURS
from inlay.methods import method
from tests.laws.test_every_method_is_a_module import CASES
from tests.methods.bases import build

VALUES: list[Any] = [10**12, -1, "(a+)+$", {"a": 1}]
ANYTHING = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
"""Fields that only say where a file comes from."""


@pytest.mark.filterwarnings("ignore::UserWarning")  # a field that is of no use may say anything
@pytest.mark.parametrize(("name", "make", "setting"), CASES)
def test_it_loads_or_is_refused_and_nothing_else_happens(
    name: str, make: Any, setting: Any, tmp_path: Path
) -> None:
    model = inlay.get_peft_model(build(make), method(name).config(**setting))
    model.save_pretrained(tmp_path)
    (tmp_path / OURS).unlink()  # which would tell of any change
    said = json.loads((tmp_path / CONFIG).read_text())
    base = build(make)
    before = {n: id(p) for n, p in base.named_parameters()}
    refused = 0
    for field in said.keys() - ANYTHING:
        for value in VALUES:
            (tmp_path / CONFIG).write_text(json.dumps(said | {field: value}))
            try:
                inlay.PeftModel.from_pretrained(base, tmp_path).unload()
            except inlay.UserError:
                refused += 1
            assert {n: id(p) for n, p in base.named_parameters()} == before, (field, value)
    assert refused

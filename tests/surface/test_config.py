"""Configurations by themselves in PEFT's file, both ways."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import inlay
from inlay.core.errors import UserError
from inlay.methods import method, names
from tests.methods.bases import settings_of_methods

peft = pytest.importorskip("peft")
MAPPING = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING

CONFIG = "adapter_config.json"
METHODS = [
    pytest.param(method(name).config, settings, id=f"{name} {at}")
    for name, found in settings_of_methods().items()
    for at, settings in enumerate(found.LAWS)
]


def text(folder: Path) -> str:
    return (folder / CONFIG).read_text("utf-8")


@pytest.mark.parametrize(("kind", "settings"), METHODS)
def test_every_configuration_is_read_as_it_was_written(
    kind: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    assert inlay.LoraConfig.files is not None  # by asking inlay for a configuration
    given = kind(**settings)
    given.save_pretrained(tmp_path / "a")
    found = kind.from_pretrained(tmp_path / "a")
    assert type(found) is kind
    found.save_pretrained(str(tmp_path / "b"))
    assert text(tmp_path / "b") == text(tmp_path / "a")
    assert (
        json.loads(text(tmp_path / "a")).items()
        >= given.replace(peft_version=found.peft_version).to_dict().items()
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LoraConfig", {"r": 4, "target_modules": "all-linear", "rank_pattern": {"up": 2}}),
        ("LoraConfig", {"use_dora": True, "lora_alpha": 3, "target_modules": ["q_proj"]}),
        ("IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": []}),
        ("PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
        ("VeraConfig", {"r": 8, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    ],
)
def test_the_file_is_that_of_peft_to_the_byte(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs, ours = getattr(peft, name)(**settings), getattr(inlay, name)(**settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.replace(peft_version=theirs.to_dict()["peft_version"]).save_pretrained(tmp_path / "ours")
    assert text(tmp_path / "ours") == text(tmp_path / "theirs")
    assert getattr(peft, name).from_pretrained(str(tmp_path / "ours")) == theirs
    found = getattr(inlay, name).from_pretrained(tmp_path / "theirs")
    assert found.replace(peft_version=None) == ours


@pytest.mark.parametrize("kind", [t for t in MAPPING if t.value.lower() in names()])
def test_a_file_has_the_fields_of_peft_and_no_others(kind: Any) -> None:
    def fields(config: Any) -> set[str]:
        names = {field.name for field in dataclasses.fields(config)}
        return names - {"runtime_config"} - set(getattr(config, "unwritten", ()))

    assert fields(method(kind.value).config) == fields(MAPPING[kind])


def test_another_methods_file_a_file_and_no_folder_are_refused(tmp_path: Path) -> None:
    inlay.IA3Config(target_modules=["k_proj"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds the settings of IA3.*no LoraConfig"):
        inlay.LoraConfig.from_pretrained(tmp_path)
    assert isinstance(inlay.PeftConfig.from_pretrained(tmp_path), inlay.IA3Config)
    with pytest.raises(UserError, match="is a file"):
        inlay.LoraConfig().save_pretrained(tmp_path / CONFIG)
    with pytest.raises(UserError, match="no folder"):
        inlay.LoraConfig.from_pretrained("./nowhere")


def test_a_saved_adapter_keeps_its_tensors_beside_new_settings(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    inlay.LoraConfig(r=3).save_pretrained(tmp_path)
    assert inlay.LoraConfig.from_pretrained(tmp_path).r == 3
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"tensors"


def test_a_configuration_taken_past_inlay_says_where_to_take_it() -> None:
    code = "from inlay.methods.lora import LoraConfig; LoraConfig().save_pretrained('x')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "use `from inlay import LoraConfig`" in ran.stderr

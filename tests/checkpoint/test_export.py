"""What is exported is a plain transformers folder that says what the adapter said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import inlay
from inlay import LoraConfig, UserError, get_peft_model
from inlay.checkpoint.export import export_model
from inlay.data.collate import collate
from inlay.data.encode import encode
from inlay.data.read import read_rows
from inlay.objectives.sft import Sft
from inlay.train.events import Events
from inlay.train.loop import fit
from inlay.train.settings import TrainConfig

DEMO = Path(__file__).parents[2] / "recipes" / "data" / "support.jsonl"
IDS = torch.arange(3, 43).reshape(2, 20)


def adapted(base: Any, **changes: Any) -> Any:
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return get_peft_model(base, LoraConfig(**settings)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "q_proj"], ["lm_head"]])
def test_plain_transformers_gives_the_adapted_logits(tiny_llama, tmp_path, targets, tied) -> None:
    model = adapted(tiny_llama(tie_word_embeddings=tied), target_modules=targets)
    expected = logits(model)
    export_model(model.merge_and_unload(), None, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    parted = targets != "all-linear"
    assert ("lm_head.weight" in stored) == (not tied or parted)


def test_a_saved_head_is_merged_into_its_place(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(tiny_llama(tie_word_embeddings=True), modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name and parameter.requires_grad:
                parameter.add_(0.1)
    expected = logits(model)
    export_model(model.merge_and_unload(), None, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_in_bfloat16_the_first_choice_is_the_same_at_99_of_100_places(tmp_path: Path) -> None:
    """Over the demo's held-out chats, after 40 steps on the others."""
    base, tokenizer = inlay.load_base()
    rows = [encode(row, tokenizer)[0] for row in read_rows([str(DEMO)])[0]]
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    settings = {"max_steps": 40, "micro_batch_size": 16, "gradient_accumulation_steps": 1}
    config = TrainConfig(learning_rate=5e-3, precision="float32", save_steps=None, **settings)
    fit(model, tokenizer, Sft(), rows[80:], [], config, tmp_path / "run", Events(tmp_path / "run"))
    batch = collate(rows[:80], tokenizer)
    with torch.no_grad():
        expected = model.eval()(**batch.inputs()).logits.argmax(-1)
    export_model(model.merge_and_unload(), tokenizer, tmp_path / "merged", dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        same = plain(**batch.inputs()).logits.argmax(-1) == expected
    answers = batch.labels.roll(-1, 1) != -100  # where a token of an answer is predicted
    assert same[answers].float().mean().item() >= 0.99


def test_the_tokenizer_and_its_template_go_along(tiny_llama, tiny_tokenizer, tmp_path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    export_model(tiny_llama(), tiny_tokenizer, tmp_path / "plain", chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.chat_template == template
    assert tiny_tokenizer.chat_template != template
    assert tokenizer("abc").input_ids == tiny_tokenizer("abc").input_ids


def test_the_model_in_memory_keeps_its_dtype(tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    export_model(model, None, tmp_path / "half", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.dtype != torch.bfloat16


def test_a_model_with_adapters_and_a_folder_in_use_are_refused(tiny_llama, tmp_path) -> None:
    with pytest.raises(UserError, match="merge_and_unload"):
        export_model(adapted(tiny_llama()).get_base_model(), None, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_model(tiny_llama(), None, tmp_path / "b")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "a").exists()

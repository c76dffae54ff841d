"""What the demo shows: the base cannot do the task, the adapter can, and not by its size alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.data.dataset import prepare
from inlay.objectives.sft import Sft
from inlay.train.answers import exact_match
from inlay.train.events import Events
from inlay.train.loop import fit
from tests.documents import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> inlay.Run:
    folder = tmp_path_factory.mktemp("demo") / "run"
    return inlay.train(ROOT / "recipes" / "demo.yaml", output_dir=str(folder))


def test_the_base_is_right_at_most_once_in_ten_and_the_adapter_nine_times(demo: Any) -> None:
    scores = json.loads((demo.folder / "evaluation.json").read_text("utf-8"))
    assert scores["held_out"] == scores["base"]["answered"] == scores["adapter"]["answered"] == 80
    assert scores["base"]["exact_match"] <= 0.10
    assert scores["adapter"]["exact_match"] >= 0.90
    assert (demo.folder / "loss.png").is_file()


def test_the_adapter_does_better_than_a_model_of_its_size_trained_from_scratch(
    demo: Any, tmp_path: Path
) -> None:
    """The same rows, steps, tokenizer and number of parameters, at the best of three rates."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, tokenizer = demo.load()
    budget = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    data = prepare(demo.config.data, tokenizer)
    best = 0.0
    for rate in (2e-3, 5e-3, 1e-2):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=40,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        scratch = LlamaForCausalLM(config)
        size = sum(p.numel() for p in scratch.parameters())
        assert 0.9 * budget < size <= 1.1 * budget
        settings = demo.config.train.__class__(
            num_epochs=4,
            micro_batch_size=16,
            gradient_accumulation_steps=1,
            learning_rate=rate,
            save_steps=None,
        )
        folder = tmp_path / f"{rate}"
        fit(scratch, tokenizer, Sft(), data.train, [], settings, folder, Events(folder))
        found = exact_match(scratch, tokenizer, data.eval_rows, max_new_tokens=32)
        best = max(best, found.exact_match)
    print(f"from scratch, best of three rates: {best:.1%}")
    assert best + 0.2 < demo.evaluation["adapter"]["exact_match"]

"""transformers' Trainer finds inputs and labels, and trains what a plain loop trains."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay import LoraConfig, PeftModel, get_peft_model
from inlay.surface.tasks import CLASSES

ROWS = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(3, 11)]


def adapted(tiny_llama: Any, **given: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **given)
    return get_peft_model(tiny_llama(), config)


def test_the_trainer_trains_and_evaluates_an_adapted_model(tiny_llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, expected = adapted(tiny_llama), adapted(tiny_llama)
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=ROWS, eval_dataset=ROWS)
    assert trainer.label_names == ["labels"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0

    trained = [p for p in expected.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0)
    for at in (0, 4):
        ids = torch.tensor([row["input_ids"] for row in ROWS[at : at + 4]])
        expected(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [PeftModel, *CLASSES.values()])
def test_every_class_names_its_inputs_and_takes_any_other(kind: type) -> None:
    names = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    assert list(names)[:2] == ["self", "input_ids"]
    assert names["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    assert names["adapter_names"].kind is inspect.Parameter.KEYWORD_ONLY


def test_inputs_by_position_are_the_models_own(tiny_llama: Any) -> None:
    model = adapted(tiny_llama).eval()
    ids, mask = torch.arange(3, 9)[None], torch.ones(1, 6, dtype=torch.long)
    places = torch.arange(6)[None] + 2
    told = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(model(ids, mask, places).logits, told, rtol=0, atol=0)


def test_mixed_precision_is_put_around_the_model_itself(tiny_llama: Any) -> None:
    """Another forward in its place, as TRL puts one there, is still the base's."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = adapted(tiny_llama, init_lora_weights=False), torch.arange(3, 9)[None]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids).logits
    accelerate.state.AcceleratorState._reset_state()  # of the trainers above, which it would share
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    found = prepared(input_ids=ids).logits
    accelerate.state.AcceleratorState._reset_state()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())
    assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    torch.testing.assert_close(model(input_ids=ids).logits, expected.float(), rtol=0.1, atol=0.1)


def test_a_compiled_model_is_the_model(tiny_llama: Any) -> None:
    model = adapted(tiny_llama, init_lora_weights=False).eval()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)

"""transformers' Trainer has the same losses by the fast paths as by the plain layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import inlay
from inlay import LoraConfig
from tests.methods.bases import build, llama, randomize

ROWS = [{"input_ids": [*range(3, 3 + n)], "labels": [*range(3, 3 + n)]} for n in (5, 9, 4, 7, 6, 6)]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["labels"]) for row in rows)
    filled = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])
        for key, value in filled.items()
    }
    return batch | {"attention_mask": (batch["labels"] != -100).long()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_the_trainer(tmp_path: Path, checkpointing: bool, half: bool) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        train_sampling_strategy="sequential",
        activation_checkpointing=checkpointing,
        bf16=half,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def losses(is_fast: bool) -> list[float]:
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.1)
        model = inlay.get_peft_model(build(llama), config)
        randomize(model, 0.2)
        trainer = Trainer(model, settings, padded, train_dataset=ROWS, eval_dataset=ROWS)
        paths = inlay.fast(model) if is_fast else None
        trainer.train()
        assert paths is None or len(paths.layers) == 2 * 7
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*logged, trainer.evaluate()["eval_loss"]]

    found, wanted = losses(True), losses(False)
    assert len(wanted) == 4
    assert found == pytest.approx(wanted, rel=0.02 if half else 1e-4)

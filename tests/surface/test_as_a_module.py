"""An adapted model is an ordinary module to others: TRL's trainer, DDP, the compiler, copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay import LoraConfig, get_peft_model
from tests.methods.bases import build, llama, output, randomize

ROWS = [{"input_ids": [i, i + 1, i + 2, i + 3]} for i in range(3, 19)]
SETTINGS = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def adapted(make: Any = tied) -> inlay.PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(build(make), LoraConfig(**SETTINGS))
    randomize(model)
    return model


def train_with_trl(model: Any, folder: Path, **settings: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    _, tokenizer = inlay.load_base()  # not needed for rows of ids, but the trainer asks for one
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    rows = Dataset.from_list(ROWS)
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 8}], ids=str)
def test_trls_trainer_trains_it_as_it_trains_pefts(settings: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    ours = adapted()
    ours.save_pretrained(tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(build(tied), tmp_path / "start", is_trainable=True)
    frozen = {n: p.clone() for n, p in ours.named_parameters() if not p.requires_grad}
    losses = train_with_trl(ours, tmp_path / "ours", **settings)
    assert losses == pytest.approx(
        train_with_trl(theirs, tmp_path / "theirs", **settings), rel=1e-4
    )
    assert len(losses) == 4
    assert not torch.allclose(output(ours.eval()), output(adapted().eval()), atol=1e-3)
    for name, parameter in ours.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    torch.testing.assert_close(output(ours.eval()), output(theirs.eval()), rtol=1e-3, atol=1e-3)
    # what the trainer saved on the way loads, the head that is tied to the embedding included
    again = adapted()
    saved = load_file(tmp_path / "ours" / "checkpoint-4" / "model.safetensors")
    again.load_state_dict(saved)
    torch.testing.assert_close(output(again.eval()), output(ours))
    # with the trainer's own forward still in place
    assert ours.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_a_state_dict_goes_through_safetensors_with_tied_weights(tmp_path: Path) -> None:
    model, other = adapted(), adapted()
    randomize(model, 0.3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(output(other.eval()), output(model.eval()), rtol=0, atol=0)
    base = other.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_ddp_wraps_it_and_gives_the_gradients_of_the_plain_model(
    quantize: str | None, tmp_path: Path
) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model, plain = (adapted(lambda: inlay.load_base(quantize=quantize)[0]) for _ in "ab")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        sent = {name for name, _ in model.named_buffers()} - wrapped.parameters_to_ignore
        assert not [name for name in sent if "absmax" in name]
        ids = torch.arange(3, 23).reshape(2, 10)
        for one in (wrapped, plain):
            one(input_ids=ids, labels=ids).loss.backward()
        for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) == (expected.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, expected.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.1}, {}], ids=str)
def test_the_compiler_and_copies_and_dtypes_compute_the_same(config: dict[str, Any]) -> None:
    model = get_peft_model(build(llama), LoraConfig(**SETTINGS, **config)).eval()
    randomize(model)
    expected = output(model)
    torch.testing.assert_close(output(copy.deepcopy(model)), expected, rtol=0, atol=0)
    compiled = torch.compile(model, backend="eager")
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(output(model.double().float()), expected, rtol=0, atol=0)
    half = output(model.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)

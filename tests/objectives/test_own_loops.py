"""`inlay.causal_lm_loss` is the loss that a model gives itself, with the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import inlay
from inlay import AdaLoraConfig, LoraConfig, PromptTuningConfig, UserError, get_peft_model
from inlay.objectives import tokens
from inlay.objectives.tokens import causal_lm_loss
from inlay.surface.fast import fast
from tests.methods.bases import build, llama, randomize
from tests.model.conftest import ARCHITECTURES, SMALL

IDS = torch.randint(1, 39, (3, 9), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(9) < torch.tensor([[4], [0], [7]]), -100)
BATCH = {
    "input_ids": IDS,
    "labels": LABELS,
    "attention_mask": (torch.arange(9) < torch.tensor([[9], [9], [8]])).long(),
}
BY_NEXT_TOKEN = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"),
    *("opt", "falcon", "mixtral", "qwen3_moe"),
}


def of(name: str) -> Any:
    config_class, model_class, settings, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    return getattr(transformers, model_class)(config).float()


def adapted(base: Any, config: Any = None) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(base, config or LoraConfig(r=2, target_modules="all-linear"))
    randomize(model, 0.2)
    return model.train()


def both(model: Any, batch: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Return loss and gradients of the model's own, and of ours."""
    found = []
    for loss_of in (lambda: model(**batch).loss, lambda: causal_lm_loss(model, batch)):
        torch.manual_seed(7)
        loss = loss_of()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    return found


def assert_same(found: list[list[torch.Tensor]]) -> None:
    own, ours = found
    assert len(own) == len(ours) > 1
    for one, other in zip(own, ours, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def is_known(model: Any) -> bool:
    call = {name: value for name, value in BATCH.items() if name != "labels"}
    return tokens._known_output(model, call, LABELS) is not None


@pytest.mark.parametrize("name", sorted(BY_NEXT_TOKEN))
def test_decoders(name: str) -> None:
    model = adapted(of(name))
    assert_same(both(model, BATCH))
    assert is_known(model)


@contextmanager
def made_by_head() -> Iterator[list[int]]:
    """Tell how many rows of logits each call of a linear to the vocabulary makes."""
    made: list[int] = []
    compute = torch.nn.Linear.forward

    def note(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.out_features == SMALL["vocab_size"]:
            made.append(x[..., 0].numel())
        return compute(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", note)
        yield made


@pytest.mark.parametrize("half", [False, True])
def test_a_head_makes_no_logits(half: bool) -> None:
    model = adapted(of("llama"))
    causal_lm_loss(model, BATCH)  # which tries it
    with torch.autocast("cpu", torch.bfloat16, enabled=half), fast(model), made_by_head() as made:
        own = model(**BATCH).loss
        assert made == [IDS.numel()]
        ours = causal_lm_loss(model, BATCH)
        assert made == [IDS.numel(), 0]
    torch.testing.assert_close(ours, own, rtol=0.01 if half else 1e-5, atol=0)


def test_losses_of_another_kind_are_the_models_own() -> None:
    small = {**SMALL, "num_key_value_heads": 2}
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**small))
    model = adapted(masked, LoraConfig(r=2, target_modules=["key"]))
    assert_same(both(model, BATCH))
    assert not is_known(model)
    routed = of("mixtral")
    routed.config.output_router_logits = True  # which adds a loss of its own
    model = adapted(routed)
    assert_same(both(model, BATCH))
    assert not is_known(model)
    base = of("t5")
    base.config.decoder_start_token_id = base.config.pad_token_id = 0
    seq2seq = adapted(base, LoraConfig(r=2, target_modules=["q"]))
    assert_same(both(seq2seq, BATCH))
    assert not is_known(seq2seq)


def test_what_a_call_may_say_besides() -> None:
    model = adapted(build(llama))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter(["default", "other"])
    randomize(model, 0.2)
    for more in (
        {"num_items_in_batch": torch.tensor(31)},
        {"adapter_names": ["other", "__base__", "default"]},
        {"position_ids": torch.arange(9).expand(3, 9) + 1},
        {"logits_to_keep": 0},
        {"shift_labels": LABELS.roll(-2, 1)},
    ):
        assert_same(both(model, {**BATCH, **more}))
    assert is_known(model)


def test_adapters_with_a_say_in_the_loss() -> None:
    config = AdaLoraConfig(total_step=10, target_modules=["q_proj"], orth_reg_weight=0.5)
    model = adapted(build(llama), config)
    assert_same(both(model, BATCH))
    with torch.no_grad():
        plain = [model.eval()(**BATCH).loss, causal_lm_loss(model, BATCH)]
    torch.testing.assert_close(plain[0], plain[1])
    prompts = adapted(build(llama), PromptTuningConfig(num_virtual_tokens=3))
    assert_same(both(prompts, BATCH))
    assert not is_known(prompts)


def test_the_first_batch_may_be_of_few_tokens_or_begin_with_padding() -> None:
    model = adapted(of("llama"))
    assert_same(both(model, {"input_ids": IDS[:, :3], "labels": LABELS[:, :3]}))
    model = adapted(of("llama"))
    assert causal_lm_loss(model, {"input_ids": IDS[:, :1], "labels": IDS[:, :1]}).isnan()
    padded = torch.cat([torch.zeros(3, 9, dtype=torch.long), IDS], 1)
    mask = (torch.arange(18) >= 9).long().expand(3, 18)
    labels = padded.masked_fill(mask == 0, -100)
    assert_same(both(model, {"input_ids": padded, "labels": labels, "attention_mask": mask}))
    assert is_known(model)


def test_a_loss_that_is_changed_after_the_first_call() -> None:
    model = adapted(of("mixtral"))
    base = model.get_base_model()
    causal_lm_loss(model, BATCH)
    assert is_known(model)
    base.config.output_router_logits = True
    assert_same(both(model, BATCH))
    base.config.output_router_logits = False
    assert_same(both(model, {**BATCH, "output_router_logits": True}))
    base.loss_function = lambda logits, *_, **__: logits.square().mean()
    assert_same(both(model, BATCH))


def test_a_batch_that_trains_nothing_has_the_loss_that_the_model_gives_it() -> None:
    model = adapted(build(llama))
    batch = {**BATCH, "labels": torch.full_like(IDS, -100)}
    assert causal_lm_loss(model, batch).isnan()
    assert model(**batch).loss.isnan()


def test_a_batch_without_labels() -> None:
    with pytest.raises(UserError, match="no tensor of labels: give labels=input_ids"):
        causal_lm_loss(adapted(build(llama)), {"input_ids": IDS})


def test_in_a_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class Own(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **told: Any
        ) -> Any:
            assert not return_outputs
            return inlay.causal_lm_loss(model, {**inputs, **told})

    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(IDS, LABELS, strict=True)]

    def losses(kind: type[Trainer]) -> list[float]:
        settings = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            learning_rate=0.01,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = kind(adapted(build(llama)), settings, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(Own) == pytest.approx(losses(Trainer), rel=1e-4)

"""Head and loss together are the loss over the model's own logits, for every kind of model."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import inlay
from inlay.data.encode import Example
from inlay.data.rows import Source
from inlay.model import output
from inlay.model.output import find_output
from inlay.objectives.sft import Sft
from inlay.train.evaluate import evaluate_loss
from tests.data.tiny_models import build

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mixtral": {},
    "gpt2": {},
    "gpt_neox": {},
    "phi": {},  # a bias
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma2": {"final_logit_softcapping": 0.25},
    "gemma3_text": {},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "falcon_h1": {"lm_head_multiplier": 0.04, "mamba_d_ssm": 32, "mamba_n_heads": 4},
}


def rows(words: int = 128) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for i, (length, masked) in enumerate([(9, 4), (5, 1), (7, 7), (3, 0)]):
        ids = torch.randint(5, words, (length,), generator=generator).tolist()
        labels = [-100] * masked + ids[masked:]
        weights = [1.0 + i] * length
        where = Source("a.jsonl", i + 1)
        made.append(
            Example(input_ids=ids, labels=labels, row_id=f"{i}", source=where, weights=weights)
        )
    return made


def shares(model: Any, tokenizer: Any, **settings: Any) -> list[tuple[float, dict[str, Any]]]:
    """Return loss and gradients by the fused path and by the plain one."""
    found = []
    for fast in (True, False):
        objective = Sft(fast=fast, **settings)
        batch = objective.collate(rows(), tokenizer)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            loss = objective.loss(model, batch, objective.counts(batch))
        model.zero_grad()
        loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((loss.item(), trained))
    return found


def same(found: list[tuple[float, dict[str, Any]]]) -> None:
    (loss, gradients), (plain, wanted) = found
    assert loss == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def is_fused(model: Any) -> bool:
    return find_output(model, {"input_ids": torch.arange(5, 14)[None]}) is not None


def trained(model: Any, seed: int = 1) -> Any:
    """Return the model with adapters that are not as they began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_trains_whole(tiny_tokenizer: Any, kind: str) -> None:
    model = build(kind, "eager", **KINDS[kind])
    assert is_fused(model)
    same(shares(model, tiny_tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_trains_an_adapter(tiny_tokenizer: Any, kind: str) -> None:
    config = inlay.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = trained(inlay.get_peft_model(build(kind, "eager", **KINDS[kind]), config))
    assert is_fused(model)
    same(shares(model, tiny_tokenizer))


@pytest.mark.parametrize(
    "config",
    [
        inlay.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        inlay.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        inlay.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], lora_dropout=0.5),
    ],
    ids=lambda config: str(config.peft_type),
)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_what_is_called_at_the_root_and_what_draws(
    tiny_tokenizer: Any, kind: str, config: Any
) -> None:
    model = trained(inlay.get_peft_model(build(kind, "eager"), config)).train()
    assert is_fused(model)
    same(shares(model, tiny_tokenizer))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_an_adapter_takes_the_plain_path(
    tiny_tokenizer: Any, settings: dict[str, Any], tied: bool
) -> None:
    settings = {
        key: value for key, value in settings.items() if key != "ensure_weight_tying" or tied
    }
    base = build("llama", "eager", tie_word_embeddings=tied)
    model = inlay.get_peft_model(base, inlay.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    plain = type(model.get_output_embeddings()) is torch.nn.Linear
    assert is_fused(trained(model)) == plain
    same(shares(model, tiny_tokenizer))


def test_checkpointed_activations(tiny_tokenizer: Any) -> None:
    config = inlay.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = trained(inlay.get_peft_model(build("llama", "sdpa"), config)).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    same(shares(model, tiny_tokenizer))


def test_bfloat16_and_autocast(tiny_tokenizer: Any) -> None:
    narrow, wide = build("llama", "eager").bfloat16(), build("llama", "eager")
    for model, context in (
        (narrow, torch.autocast("cpu", enabled=False)),
        (wide, torch.autocast("cpu", dtype=torch.bfloat16)),
    ):
        with context:
            (loss, gradients), (plain, wanted) = shares(model, tiny_tokenizer)
        assert loss == pytest.approx(plain, rel=2e-3)
        for name, gradient in gradients.items():
            assert gradient.dtype == wanted[name].dtype
            near = torch.nn.functional.cosine_similarity(
                gradient.flatten().float(), wanted[name].flatten().float(), dim=0
            )
            assert near > 0.99, name


class Another(torch.nn.Module):
    """A model that does something to its logits that no formula here says."""

    def __init__(self, model: Any, does: Any) -> None:
        super().__init__()
        self.model, self.does, self.config = model, does, model.config

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, **call: Any) -> Any:
        found = self.model(**call)
        return type(found)(logits=self.does(found.logits))


@pytest.mark.parametrize(
    "does",
    [
        lambda z: 1.01 * z,
        lambda z: z.clamp(-80, 80),
        lambda z: z + 0.5 * torch.arange(z.shape[-1]),
        lambda z: z.roll(1, -1),
        lambda z: torch.cat([z[..., :-1], torch.full_like(z[..., -1:], float("-inf"))], -1),
        lambda z: z.new_tensor(0.0),
        lambda z: z / 0,
    ],
)
def test_a_head_that_does_more_takes_the_plain_path(does: Any) -> None:
    call = {"input_ids": torch.arange(5, 14)[None]}
    assert find_output(Another(build("llama", "eager"), lambda z: z), call) is not None
    assert find_output(Another(build("llama", "eager"), does), call) is None


def test_a_watched_head_takes_the_plain_path_as_long_as_it_is() -> None:
    model = build("llama", "eager")
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert not is_fused(model)
    handle.remove()
    assert is_fused(model)


def test_a_head_is_tried_once_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = build("llama", "eager"), []
    first = output._try
    monkeypatch.setattr(output, "_try", lambda *given: tried.append(1) or first(*given))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert is_fused(model.train())
    assert is_fused(model)
    assert torch.equal(torch.rand(2), expected)
    assert tried == [1]
    assert not model.lm_head._forward_pre_hooks
    head = weakref.ref(model.lm_head)
    del model
    gc.collect()
    assert head() is None, "what was found keeps the model in memory"


def test_an_evaluation_is_the_same_by_both_paths(tiny_tokenizer: Any) -> None:
    model = build("gemma2", "eager", final_logit_softcapping=0.25)
    found = [
        evaluate_loss(model, tiny_tokenizer, Sft(fast=fast), rows(), batch_size=3)
        for fast in (True, False)
    ]
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-6)


def test_no_logits_are_kept_for_the_backward_pass(tiny_tokenizer: Any) -> None:
    model, kept = build("llama", "eager"), {}
    for fast in (True, False):
        objective, sizes = Sft(fast=fast), []
        batch = objective.collate(rows(), tiny_tokenizer)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.shape) or t, lambda t: t
        ):
            objective.loss(model, batch, objective.counts(batch))
        weight = (32, 128)
        kept[fast] = sum(s.numel() for s in sizes if s[-1:] == (128,) and s != weight)
    assert kept[True] == 0
    assert kept[False] >= 128 * 7  # the trained tokens

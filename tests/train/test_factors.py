"""LoRA+ and LoRA-FA in the loop: what moves, at which rate, and a resumed run is the same run."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.core.errors import UserError
from inlay.train.events import Events
from inlay.train.loop import fit
from inlay.train.optim import make_optimizer
from inlay.train.settings import TrainConfig
from inlay.train.setup import trainable
from tests.methods.bases import build, llama

SMALL = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "precision": "float32"}


def lora(**settings):
    torch.manual_seed(0)
    return inlay.get_peft_model(
        build(llama), inlay.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    )


@pytest.fixture
def run(toy, tmp_path):
    def start(model, folder="run", resume=False, **config):
        at = tmp_path / folder
        settings = TrainConfig(**{**SMALL, **config})
        arguments = (model, None, toy.objective, toy.rows(12), [], settings, at, Events(at))
        return fit(*arguments, resume=resume)

    return start


def weights(model):
    return {key: t.clone() for key, t in inlay.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize(
    "train", [{"optimizer": "lorafa"}, {"optimizer": "riemannian"}, {"loraplus_lr_ratio": 4.0}]
)
def test_a_resumed_run_is_the_same_run(run, train):
    train = {"lr_scheduler": "constant", **train}
    whole, first, cut = lora(), lora(), lora()
    before = weights(cut)
    run(whole, "whole", max_steps=6, **train)
    run(first, "cut", max_steps=3, **train)
    run(cut, "cut", max_steps=6, resume=True, **train)
    after = weights(cut)
    for key, wanted in weights(whole).items():
        assert torch.equal(after[key], wanted), key
        frozen = train.get("optimizer") == "lorafa" and "lora_A" in key
        assert torch.equal(after[key], before[key]) == frozen, key
    assert all(p.requires_grad for n, p in cut.named_parameters() if "lora_A" in n)


def test_the_rate_of_the_second_factor_is_its_ratio_of_the_schedules():
    model = lora(target_modules=["q_proj", "embed_tokens"])
    config = TrainConfig(learning_rate=0.01, loraplus_lr_ratio=16, loraplus_lr_embedding=0.001)
    parameters = trainable(model)
    names = {p: n for n, p in parameters.items()}
    groups = make_optimizer(parameters, config, model).param_groups
    found = {names[p]: g["ratio"] for g in groups for p in g["params"]}
    assert len(found) == len(parameters)
    for name, ratio in found.items():
        assert ratio == (0.1 if "embed" in name else 16 if name.endswith("lora_B") else 1), name


def test_settings_that_cannot_be_are_refused(run):
    with pytest.raises(UserError, match=r"train\.optimizer is 'sgd'; it must be one of adamw"):
        TrainConfig(optimizer="sgd").validate()
    with pytest.raises(UserError, match="with optimizer lorafa there is no A"):
        TrainConfig(optimizer="lorafa", loraplus_lr_ratio=2.0).validate()
    with pytest.raises(UserError, match="is for a LoRA in training"):
        run(inlay.get_peft_model(build(llama), inlay.IA3Config()), optimizer="lorafa")

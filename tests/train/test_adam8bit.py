"""AdamW in 8 bits: its steps beside AdamW's, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inlay.checkpoint.train import write_checkpoint
from inlay.train.adam8bit import AdamW8bit
from inlay.train.events import Events
from inlay.train.loop import fit
from inlay.train.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors
from inlay.train.settings import TrainConfig

CONFIG = TrainConfig(optimizer="adamw_8bit", learning_rate=0.01, weight_decay=0.1)


def parameters():
    torch.manual_seed(0)
    shapes = {"big": (90, 70), "long": (5003,), "small": (5, 3)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def steps(made, optimizer, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in made.values():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.grad = drawn.to(parameter.dtype)
        optimizer.step()


def test_fifty_steps_come_near_to_those_of_adamw():
    made, plain = parameters(), parameters()
    start = {name: p.detach().clone() for name, p in made.items()}
    optimizer = make_optimizer(made, CONFIG)
    assert isinstance(optimizer, AdamW8bit)
    steps(made, optimizer, 50)
    exact = TrainConfig(learning_rate=0.01, weight_decay=0.1)
    steps(plain, make_optimizer(plain, exact), 50)
    torch.testing.assert_close(made["small"], plain["small"], rtol=0, atol=1e-6)
    for name in ("big", "long"):
        off = (made[name] - plain[name]).norm() / (plain[name] - start[name]).norm()
        assert off < 0.05


def test_the_moments_take_two_bytes_a_value():
    made = {"weight": nn.Parameter(torch.zeros(256, 256))}
    steps(made, optimizer := make_optimizer(made, CONFIG), 1)
    held = sum(t.nbytes for t in optimizer_tensors(optimizer, made).values())
    assert held / 256**2 == pytest.approx(2 + 8 / 256, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_put_back_by_name_goes_on_with_the_same_bits(dtype, tmp_path):
    whole, cut = parameters(), parameters()
    for made in (whole, cut):
        for parameter in made.values():
            parameter.data = parameter.data.to(dtype)
    optimizer = make_optimizer(whole, CONFIG)
    steps(whole, optimizer, 3)
    saved = write_checkpoint(tmp_path, 3, optimizer_tensors(optimizer, whole), {}).tensors()
    for name, parameter in cut.items():
        parameter.data.copy_(whole[name].data)
    steps(whole, optimizer, 3, seed=2)
    resumed = make_optimizer(cut, CONFIG)
    load_optimizer_tensors(resumed, cut, saved)
    steps(cut, resumed, 3, seed=2)
    torch.testing.assert_close(dict(cut), dict(whole), rtol=0, atol=0)


def test_a_resumed_run_ends_with_the_same_bits(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("inlay.train.adam8bit.LEAST", 16)  # the toy's matrices have 32 values
    model = {name: toy.model() for name in ("whole", "cut", "resumed")}

    def go(name, folder, steps, resume=False):
        config = TrainConfig(
            optimizer="adamw_8bit",
            lr_scheduler="constant",
            micro_batch_size=2,
            max_steps=steps,
            warmup_steps=2,
            save_steps=3,
        )
        events = Events(tmp_path / folder)
        at = tmp_path / folder
        fit(model[name], None, toy.objective, toy.rows(10), [], config, at, events, resume=resume)

    go("whole", "whole", 6)
    go("cut", "cut", 3)
    go("resumed", "cut", 6, resume=True)
    ours, theirs = model["resumed"].state_dict(), model["whole"].state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.equal(ours["a.weight"], toy.model().a.weight)

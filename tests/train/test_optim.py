"""AdamW: its formula, where it decays, and its state by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inlay.train.optim import (
    is_matrix,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from inlay.train.settings import TrainConfig


def parameters():
    torch.manual_seed(0)
    shapes = {"norm": (5,), "b": (5, 2), "scale": (1, 5), "a": (2, 5), "bias": (3,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def steps(made, optimizer, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in made.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(
    ("shape", "decays"),
    [((4, 3), True), ((4, 3, 1, 1), True), ((4,), False), ((1, 4), False), ((4, 1), False)],
)
def test_only_matrices_decay(shape, decays):
    assert is_matrix(torch.empty(shape)) is decays


def test_five_steps_are_the_papers_formula():
    config = TrainConfig(learning_rate=0.01, weight_decay=0.1, adam_beta2=0.95)
    made, plain = parameters(), parameters()
    steps(made, make_optimizer(made, config), 5)
    generator = torch.Generator().manual_seed(1)
    first = {name: torch.zeros_like(p) for name, p in plain.items()}
    second = {name: torch.zeros_like(p) for name, p in plain.items()}
    for t in range(1, 6):
        for name, parameter in plain.items():
            grad = torch.randn(parameter.shape, generator=generator)
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            decay = 0.1 if name in ("a", "b") else 0.0
            update = (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            parameter.data -= 0.01 * (update + decay * parameter.data)
    torch.testing.assert_close(dict(made), dict(plain), rtol=0, atol=1e-6)


def test_the_state_put_back_by_name_goes_on_with_the_same_bits():
    config = TrainConfig(weight_decay=0.1)
    whole, cut = parameters(), parameters()
    steps(whole, optimizer := make_optimizer(whole, config), 3)
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, whole).items()}
    assert set(saved) == {f"{k}.{n}" for k in ("step", "exp_avg", "exp_avg_sq") for n in whole}
    for name, parameter in cut.items():
        parameter.data.copy_(whole[name].data)
    steps(whole, optimizer, 3, seed=2)
    resumed = make_optimizer(cut, config)
    load_optimizer_tensors(resumed, cut, saved)
    steps(cut, resumed, 3, seed=2)
    torch.testing.assert_close(dict(cut), dict(whole), rtol=0, atol=0)

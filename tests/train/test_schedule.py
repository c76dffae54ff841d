"""The learning rate over the steps."""

from __future__ import annotations

import pytest
import torch

from inlay.train.schedule import learning_rate, warmup_steps
from inlay.train.settings import TrainConfig


def rates(total, **settings):
    config = TrainConfig(learning_rate=1.0, **settings)
    return [learning_rate(step, total, config) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_it_rises_to_the_peak_and_never_over_it_nor_to_zero(kind):
    found = rates(50, lr_scheduler=kind, warmup_steps=9)
    assert found[:9] == pytest.approx([(s + 1) / 10 for s in range(9)])
    assert found[9] == max(found) == 1.0
    assert found[9:] == sorted(found[9:], reverse=True)
    assert min(found) > 0


def test_every_schedule_is_transformers_own_after_the_warmup():
    from transformers import (
        get_constant_schedule_with_warmup,
        get_cosine_schedule_with_warmup,
        get_linear_schedule_with_warmup,
    )

    makers = {
        "cosine": get_cosine_schedule_with_warmup,
        "linear": get_linear_schedule_with_warmup,
        "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(
            optimizer, warmup
        ),
    }
    for kind, make in makers.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        theirs = make(optimizer, 5, 40)
        expected = []
        for _ in range(40):
            expected.append(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()
        assert rates(40, lr_scheduler=kind, warmup_steps=5)[5:] == pytest.approx(expected[5:])


def test_the_ratio_counts_steps_upward_and_the_number_wins():
    assert warmup_steps(10, TrainConfig()) == 1
    assert warmup_steps(10, TrainConfig(warmup_steps=0)) == 0
    assert warmup_steps(10, TrainConfig(warmup_steps=99)) == 10

"""Poly: which task a row is of, said by the call, reaches every layer and every way of running."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from inlay import LoraConfig, PolyConfig, UserError, get_peft_model
from tests.methods.bases import build, llama, output, randomize, t5

SETTINGS: dict[str, Any] = {"r": 2, "n_tasks": 3, "target_modules": ["q_proj", "down_proj"]}


def adapted(make: Any = llama, **changes: Any) -> Any:
    model = get_peft_model(build(make), PolyConfig(**SETTINGS | changes)).eval()
    randomize(model, 0.5)
    return model


def test_each_row_computes_as_a_batch_of_its_task_alone() -> None:
    model = adapted()
    mixed = output(model, task_ids=torch.tensor([2, 0]))
    for row, task in enumerate((2, 0)):
        torch.testing.assert_close(mixed[row], output(model, task_ids=[task, task])[row])
    assert not torch.allclose(mixed, output(model, task_ids=[0, 2]), atol=1e-3)


def test_rows_of_other_adapters_stand_between_the_tasks_rows() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.arange(3, 18).reshape(3, 5)
    names = ["other", "default", "default"]
    mixed = model(input_ids=ids, adapter_names=names, task_ids=[0, 2, 1]).logits
    for row, (name, task) in enumerate(zip(names, (0, 2, 1), strict=True)):
        model.set_adapter(name)
        alone = model(input_ids=ids[row : row + 1], task_ids=[task]).logits
        torch.testing.assert_close(mixed[row : row + 1], alone)


def test_beams_of_a_row_are_of_its_task() -> None:
    model = adapted(t5, target_modules=["q", "v"])
    ids = torch.arange(3, 23).reshape(2, 10)
    given = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    given["decoder_start_token_id"] = 0
    both = model.generate(input_ids=ids, task_ids=[2, 0], **given)
    for row, task in enumerate((2, 0)):
        alone = model.generate(input_ids=ids[row : row + 1], task_ids=[task], **given)
        assert torch.equal(both[row], alone[0])


def test_what_a_backward_pass_computes_again_is_of_the_same_tasks() -> None:
    model = adapted()
    selection = model.roster.selection
    host = model.roster.hosts["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 3, 32)
    found = []
    for again in (False, True):
        model.zero_grad()
        with selection.using(said={"task_ids": torch.tensor([1, 2])}):
            if again:
                context = selection.checkpoint_context
                out = checkpoint(host, x, use_reentrant=False, context_fn=context)
            else:
                out = host(x)
        out.square().sum().backward()
        found.append(host.adapters["default"].module_logits.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert not found[0][0].any()
    assert found[0][1].any()


def test_a_mix_is_drawn_in_training_alone() -> None:
    model = adapted()
    first, again = (output(model, task_ids=[0, 1]) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    model.train()
    first, again = (output(model, task_ids=[0, 1]) for _ in range(2))
    assert not torch.allclose(first, again, atol=1e-4)


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        (None, r"n_tasks=3: say of each row which, model\(\.\.\., task_ids="),
        ([0, 3], r"task_ids=\[0, 3\] must be one number a row, from 0 to 2"),
        ([0, -1], "from 0 to 2"),
        ([[0], [1]], "must be one number a row"),
        ([0.5, 1.0], "must be one number a row"),
        ([0, 1, 2], "task_ids has 3 rows, but the batch has 2"),
    ],
)
def test_tasks_that_are_none_are_refused(tasks: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        output(adapted(), task_ids=tasks)


def test_parts_that_do_not_divide_a_layer_are_refused() -> None:
    with pytest.raises(UserError, match="n_splits=3 does not divide the 32 of a layer"):
        adapted(n_splits=3)

"""Law 2: shares add up. However a step's rows are cut, loss and gradient are the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from inlay.core.errors import UserError
from inlay.data.encode import Example
from inlay.data.rows import Chat, Labeled, Source, Text
from inlay.objectives import OBJECTIVES
from inlay.train.evaluate import evaluate_loss
from inlay.train.step import Stepper

CUTS = {
    "1x8": [8],
    "2x4": [4, 4],
    "4x2": [2, 2, 2, 2],
    "8x1": [1] * 8,
    "uneven": [3, 1, 4],
}


def token_rows(count: int = 8) -> list[Example]:
    """Rows of unlike lengths and masks; the third is masked whole."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        length = int(torch.randint(3, 12, (), generator=generator))
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        masked = length if i == 2 else int(torch.randint(0, length, (), generator=generator))
        labels = [-100] * masked + ids[masked:]
        rows.append(
            Example(input_ids=ids, labels=labels, row_id=f"{i}", source=Source("law.jsonl", i + 1))
        )
    return rows


def labeled_rows() -> list[Example]:
    """Rows of unlike lengths and three classes."""
    return [
        dataclasses.replace(row, labels=[], label="abc"[i % 3])
        for i, row in enumerate(token_rows())
    ]


# what an objective eats -> rows of it; a new kind of row needs a line here
ROWS = {Chat: token_rows, Text: token_rows, Labeled: labeled_rows}
# what a run fills in of an objective
FILLED: dict[str, dict[str, Any]] = {"classify": {"labels": ["a", "b", "c"]}}


def made(name: str, packing: bool = False) -> Any:
    """Return the objective; pytest.skip where it says that it cannot pack."""
    try:
        return OBJECTIVES[name](packing=packing, **FILLED.get(name, {}))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def policies() -> dict[str, Any]:
    """Return a model of each task."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=3,
        pad_token_id=2,
    )
    kinds = {"CAUSAL_LM": LlamaForCausalLM, "SEQ_CLS": LlamaForSequenceClassification}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {task: kind(config).float() for task, kind in kinds.items()}


def step(policies, objective, tokenizer, cut):
    """Return the loss and the gradients of one step over the law's rows, cut as `cut` says."""
    rows = ROWS[objective.row]()
    micros, at = [], 0
    for size in cut:
        micros.append(rows[at : at + size])
        at += size
    policy = policies[objective.task]
    parameters = dict(policy.named_parameters())
    stepper = Stepper(policy, parameters, objective, tokenizer, torch.float32, seed=0)
    sums = stepper.gradient(0, micros)
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    policy.zero_grad(set_to_none=True)
    return sums, gradients


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_cut_gives_the_gradient_of_the_whole(policies, tiny_tokenizer, name, cut, packing):
    whole, expected = step(policies, made(name), tiny_tokenizer, [8])
    sums, gradients = step(policies, made(name, packing), tiny_tokenizer, CUTS[cut])
    assert sums.loss == pytest.approx(whole.loss, abs=1e-6)
    assert sums.trained_tokens == whole.trained_tokens
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_evaluation_loss_does_not_depend_on_the_batch_size(
    policies, tiny_tokenizer, name, packing
):
    objective = made(name)
    rows, policy = ROWS[objective.row](), policies[objective.task]
    whole = evaluate_loss(policy, tiny_tokenizer, objective, rows, batch_size=8)
    for size in (1, 3):
        part = evaluate_loss(policy, tiny_tokenizer, made(name, packing), rows, batch_size=size)
        assert part.loss == pytest.approx(whole.loss, abs=1e-6)
        assert part.tokens == whole.tokens


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_step_is_the_mean_over_tokens_and_not_the_mean_of_the_micro_batches_means(
    policies, tiny_tokenizer, name
):
    """The commonest mistake must be visible in these rows, or the law above proves nothing."""
    objective = made(name)
    rows, policy = ROWS[objective.row](), policies[objective.task]
    micros = [rows[:3], rows[3:4], rows[4:]]
    each = [evaluate_loss(policy, tiny_tokenizer, objective, micro) for micro in micros]
    whole = sum(s.loss * s.tokens for s in each) / sum(s.tokens for s in each)
    means = sum(s.loss for s in each) / len(each)
    sums, _ = step(policies, objective, tiny_tokenizer, [1] * 8)
    assert sums.loss == pytest.approx(whole, abs=1e-6)
    assert abs(means - whole) > 1e-3

"""The loss over tokens, beside five lines of plain torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from inlay.data.encode import Example
from inlay.data.rows import Source
from inlay.objectives import OBJECTIVES
from inlay.objectives.pretrain import Pretrain
from inlay.objectives.sft import Sft


def example(ids, trained_from, line=1):
    labels = [-100] * trained_from + ids[trained_from:]
    return Example(input_ids=ids, labels=labels, row_id=f"{line}", source=Source("a.jsonl", line))


ROWS = [example([5, 6, 7, 8, 9, 10], 3, 1), example([11, 12, 13], 1, 2), example([14, 15], 0, 3)]


class Unasked(torch.nn.Module):
    """A model that cannot be asked for some positions only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return self.model(input_ids, attention_mask, position_ids, use_cache=use_cache)


def plain_loss(model, rows):
    """Return the mean over all trained tokens, one row at a time."""
    losses = []
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0]
        trained = [at for at in range(1, len(row.labels)) if row.labels[at] != -100]
        losses += [-logits[at - 1].log_softmax(-1)[row.labels[at]] for at in trained]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("packing", [False, True])
def test_sft_is_the_mean_over_the_labels_shifted_once(tiny_llama, tiny_tokenizer, packing):
    model, objective = tiny_llama(), Sft(packing=packing)
    batch = objective.collate(ROWS, tiny_tokenizer)
    counts = objective.counts(batch)
    assert counts == {"tokens": 3 + 2 + 1}
    loss = objective.loss(model, batch, counts)
    torch.testing.assert_close(loss, plain_loss(model, ROWS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_pretrain_trains_every_token_but_the_first_of_each_row(tiny_llama, tiny_tokenizer, packing):
    model, objective = tiny_llama(), Pretrain(packing=packing)
    batch = objective.collate(ROWS, tiny_tokenizer)
    counts = objective.counts(batch)
    assert counts == {"tokens": 5 + 2 + 1}
    unmasked = [dataclasses.replace(row, labels=row.input_ids) for row in ROWS]
    loss = objective.loss(model, batch, counts)
    torch.testing.assert_close(loss, plain_loss(model, unmasked), rtol=0, atol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_that_trains_nothing_is_zero_and_backward_runs(tiny_llama, tiny_tokenizer, packing):
    model, objective = tiny_llama(), Sft(packing=packing)
    batch = objective.collate([example([5, 6, 7], 3), example([8, 9], 2)], tiny_tokenizer)
    assert objective.counts(batch) == {"tokens": 0}
    loss = objective.loss(model, batch, {"tokens": torch.tensor(0)})
    loss.backward()
    assert loss.item() == 0.0
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_a_share_is_divided_by_the_whole_steps_count(tiny_llama, tiny_tokenizer):
    model, objective = tiny_llama(), Sft()
    batch = objective.collate(ROWS, tiny_tokenizer)
    alone = objective.loss(model, batch, objective.counts(batch))
    share = objective.loss(model, batch, {"tokens": torch.tensor(60)})
    torch.testing.assert_close(share, alone / 10)


def test_bfloat16_logits_are_summed_in_float32(tiny_llama, tiny_tokenizer):
    model, objective = tiny_llama().bfloat16(), Sft()
    batch = objective.collate(ROWS, tiny_tokenizer)
    assert objective.loss(model, batch, objective.counts(batch)).dtype == torch.float32


def test_the_registry_is_the_files_and_an_unknown_name_is_not_there():
    assert list(OBJECTIVES) == ["classify", "pretrain", "sft"]
    assert OBJECTIVES["sft"] is Sft
    assert "base" not in OBJECTIVES
    with pytest.raises(KeyError):
        OBJECTIVES["sfr"]


@pytest.mark.parametrize(("packing", "widths"), [(False, [5, 6]), (True, [6, 11])])
def test_the_head_computes_only_where_a_row_is_trained_with_the_same_gradients(
    tiny_llama, tiny_tokenizer, packing, widths
):
    found, computed = [], []
    for kind in (None, Unasked):
        model, objective = tiny_llama(), Sft(packing=packing)
        model.lm_head.register_forward_hook(lambda *args: computed.append(args[2].shape[1]))
        batch = objective.collate(ROWS, tiny_tokenizer)
        policy = model if kind is None else kind(model)
        objective.loss(policy, batch, objective.counts(batch)).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert computed == widths

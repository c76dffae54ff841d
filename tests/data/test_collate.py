"""Padding is said by position, and packed rows do not see each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from inlay.core.errors import UserError
from inlay.data.collate import collate, pad_id
from inlay.data.encode import Example
from inlay.data.pack import bins, check_packable, pack
from inlay.data.rows import Source

EOS = SimpleNamespace(pad_token_id=9, eos_token_id=9)


def example(ids, line=1, weights=None):
    labels = [-100, *ids[1:]]
    return Example(list(ids), labels, "id", Source("rows.jsonl", line), weights)


def test_rows_are_padded_on_the_right_to_the_longest():
    batch = collate([example([1, 2, 3]), example([4, 5], 2)], EOS)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch.labels.tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (batch.position_ids, batch.weights) == (None, None)
    assert batch.rows == ("rows.jsonl:1", "rows.jsonl:2")
    assert batch.input_ids.dtype == batch.labels.dtype == torch.long


def test_an_eos_that_is_also_the_pad_token_is_still_trained():
    batch = collate([example([1, 9]), example([1, 2, 9])], EOS)
    assert batch.labels.tolist() == [[-100, 9, -100], [-100, 2, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(("pad", "eos", "filled"), [(3, 1, 3), (None, 1, 1), (None, None, 0)])
def test_a_tokenizer_without_a_pad_token_needs_none(pad, eos, filled):
    assert pad_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == filled


def test_weights_are_padded_beside_their_tokens():
    rows = [example([1, 2], weights=[1.0, 0.5]), example([1, 2, 3])]
    assert collate(rows, EOS).weights.tolist() == [[1, 0.5, 0], [1, 1, 1]]
    assert pack(rows, 5).weights.tolist() == [[1, 0.5, 1, 1, 1]]


def test_a_batch_moves_with_all_its_tensors():
    for batch in (collate([example([1, 2])], EOS), pack([example([1, 2])], 2)):
        moved = batch.to("meta")
        assert {tensor.device.type for tensor in moved.inputs().values()} == {"meta"}
        assert moved.labels.device.type == "meta"
        assert moved.rows == batch.rows


def test_no_packed_row_predicts_the_first_token_of_the_next():
    rows = [example([1, 2, 3]), Example([4, 5], [4, 5], "id", Source("rows.jsonl", 2))]
    batch = pack(rows, 5)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.attention_mask is None
    assert set(batch.inputs()) == {"input_ids", "position_ids"}


def test_a_packed_batch_that_is_too_long_is_refused():
    with pytest.raises(UserError, match="1 rows hold 3 tokens, more than the 2"):
        pack([example([1, 2, 3])], 2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_are_the_logits_of_each_row_alone(attention, tiny_llama):
    model = tiny_llama(attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    rows = [
        example(torch.randint(3, 320, (n,), generator=generator).tolist()) for n in (5, 9, 3, 17)
    ]
    with torch.no_grad():
        packed = model(**pack(rows, 34).inputs(), use_cache=False).logits[0]
        padded = model(**collate(rows, EOS).inputs(), use_cache=False).logits
        at = 0
        for i, row in enumerate(rows):
            n = len(row.input_ids)
            alone = model(torch.tensor([row.input_ids]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[at : at + n], alone, atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(padded[i, :n], alone, atol=2e-6, rtol=1e-5)
            at += n


def test_bins_hold_every_row_once_and_none_overflows():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (200,), generator=generator).tolist()
    groups = bins(lengths, 64)
    assert sorted(index for group in groups for index in group) == list(range(200))
    assert all(sum(lengths[index] for index in group) <= 64 for group in groups)
    assert len(groups) <= 11 / 9 * -(-sum(lengths) // 64) + 1
    assert bins([70, 1], 64) == [[0], [1]]


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
        {"model_type": "mamba2"},
        {"model_type": "jamba", "layers_block_type": ["mamba", "attention"]},
    ],
)
def test_packing_is_refused_where_layers_carry_a_state(settings):
    with pytest.raises(UserError, match="packing: false"):
        check_packable(SimpleNamespace(**settings))
    check_packable(SimpleNamespace(model_type="gemma3", layer_types=["sliding_attention"]))

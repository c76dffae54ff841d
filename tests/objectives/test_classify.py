"""The loss over labeled rows, beside plain torch."""

from __future__ import annotations

import pytest
import torch

from inlay.core.errors import UserError
from inlay.data.encode import Example
from inlay.data.rows import Source
from inlay.objectives.classify import Classify
from inlay.train.predict import predict

ROWS = [
    Example([5, 6, 7, 8], [], "1", Source("a.jsonl", 1), label="b"),
    Example([9, 10], [], "2", Source("a.jsonl", 2), label="a"),
    Example([11, 12, 13], [], "3", Source("a.jsonl", 3), label="c"),
]


@pytest.fixture
def classifier():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


def test_the_loss_is_the_mean_over_rows_of_their_cross_entropy(classifier, tiny_tokenizer):
    objective = Classify(labels=["a", "b", "c"])
    batch = objective.collate(ROWS, tiny_tokenizer)
    counts = objective.counts(batch)
    assert counts == {"rows": 3}
    logits = [classifier(torch.tensor([row.input_ids])).logits[0] for row in ROWS]
    each = [-one.log_softmax(-1)[i] for one, i in zip(logits, (1, 0, 2), strict=True)]
    loss = objective.loss(classifier, batch, counts)
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=0, atol=1e-6)
    found = predict(classifier, tiny_tokenizer, objective, ROWS, batch_size=2)
    assert found == ["abc"[int(one.argmax())] for one in logits]


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"train\.packing is True"):
        Classify(packing=True)
    for labels in (["a"], ["a", "a", "b"]):
        with pytest.raises(UserError, match="2 or more, each once"):
            Classify(labels=labels)

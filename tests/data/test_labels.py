"""Labeled rows: what they may say, the classes they name, how they are encoded."""

from __future__ import annotations

import json

import pytest

from inlay.core.errors import UserError
from inlay.data.dataset import prepare
from inlay.data.labels import read_labels
from inlay.data.settings import DataConfig


@pytest.fixture
def rows(tmp_path):
    """Return `rows(*records, **settings)`, the `data:` block of a file with these records."""

    def write(*records, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return DataConfig(path=str(path), format="labeled", **settings)

    return write


def test_classes_are_sorted_numbers_by_size(rows):
    config = rows(*({"text": "x", "label": label} for label in (10, "b", 9, "a", 10)))
    assert read_labels(config) == ("9", "10", "a", "b")
    assert read_labels(config, ["b", "a", "10", "9"]) == ("b", "a", "10", "9")


@pytest.mark.parametrize(
    ("records", "given", "told"),
    [
        ([{"text": "x"}], None, "rows.jsonl:1: the row has no 'label'"),
        ([{"text": "x", "label": 0.5}], None, "label must be the name of a class"),
        ([{"text": "x", "label": None}], None, "label must be the name of a class"),
        ([{"text": "x", "label": "a"}] * 2, None, "all rows have the label 'a'"),
        ([{"text": "x", "label": "cat"}], ["cats", "dogs"], "Did you mean 'cats'"),
    ],
)
def test_a_label_that_cannot_be_is_told_with_its_line(rows, records, given, told):
    with pytest.raises(UserError) as error:
        read_labels(rows(*records), given)
    assert told in str(error.value)


def test_a_row_is_encoded_as_the_tokenizer_does_it(rows, tiny_tokenizer):
    records = [{"text": "short", "label": "a"}, {"sentence": "much longer", "label": "b"}]
    done = prepare(rows(*records), tiny_tokenizer)
    assert [example.input_ids for example in done.train] == [
        tiny_tokenizer("short").input_ids,
        tiny_tokenizer("much longer").input_ids,
    ]
    assert [(example.label, example.labels) for example in done.train] == [("a", []), ("b", [])]
    assert "labels: 2 (a 50%, b 50%)" in done.describe()
    assert "trained: the label of each row" in done.describe()


@pytest.mark.parametrize(("overlong", "kept"), [("drop", 1), ("cut_end", 2)])
def test_a_long_row_is_dropped_or_cut_and_the_ledger_says_so(rows, tiny_tokenizer, overlong, kept):
    records = [{"text": "short", "label": "a"}, {"text": "long" * 9, "label": "b"}]
    done = prepare(rows(*records, max_length=8, overlong=overlong), tiny_tokenizer)
    assert len(done.train) == kept
    assert done.entries[1].reason == "longer than max_length (36 > 8 tokens)"
    assert max(len(example.input_ids) for example in done.train) <= 8


def test_copies_stay_on_one_side_whatever_their_label(rows, tiny_tokenizer):
    records = [{"text": f"text {i % 7}", "label": "ab"[i % 2]} for i in range(42)]
    done = prepare(rows(*records, eval_fraction=0.4), tiny_tokenizer)
    sides = [{row.text for row in side} for side in (done.train_rows, done.eval_rows)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]

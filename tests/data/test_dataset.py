"""Every row is accounted for, and nothing that trains also evaluates."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from inlay.core.errors import UserError
from inlay.data.dataset import prepare
from inlay.data.ledger import read_ledger
from inlay.data.settings import DataConfig


def row(question, answer="yes", **flags):
    answered = {"role": "assistant", "content": answer, **flags}
    return {"messages": [{"role": "user", "content": question}, answered]}


@pytest.fixture
def ready(tokenizers, write, tmp_path):
    """Return `ready(rows, template="chatml", **settings)` -> what prepare gives, with a ledger."""

    def make(rows, template="chatml", **settings):
        config = DataConfig(path=write(rows), **settings)
        return prepare(config, tokenizers(template), tmp_path / "ledger.jsonl")

    return make


def fates(tmp_path):
    return [(entry.outcome, entry.reason) for entry in read_ledger(tmp_path / "ledger.jsonl")]


def test_every_row_has_a_line_in_the_ledger(ready, tmp_path):
    found = ready([row("q"), row("r", train=False), row("x " * 99)], max_length=40)
    assert fates(tmp_path) == [
        ("kept", ""),
        ("dropped", "no turn is trained"),
        ("dropped", fates(tmp_path)[2][1]),
    ]
    assert "longer than max_length (" in fates(tmp_path)[2][1]
    first = json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[0])
    assert first["file"].endswith("rows.jsonl")
    assert (first["line"], first["split"], first["examples"]) == (1, "train", 1)
    assert first["tokens"] == len(found.train[0].input_ids)
    assert first["trained_tokens"] == found.train[0].trained
    assert [str(kept.source.line) for kept in found.train_rows] == ["1"]


def test_a_row_with_what_is_no_character_is_dropped_and_counted(ready, tmp_path):
    ready([row("q"), row("a \ufdd0 b")])
    assert fates(tmp_path)[1] == ("dropped", "holds U+FDD0 to U+FDD2, which are no characters")


def test_a_row_whose_question_alone_is_too_long_is_not_trained_on_the_question(ready, tmp_path):
    long = row("x " * 99)
    for overlong in ("drop", "cut_end", "split_turns"):
        found = ready([row("q"), long], max_length=40, overlong=overlong)
        assert len(found.train) == 1, overlong
        outcome, reason = fates(tmp_path)[1]
        assert outcome == "dropped"
        assert "longer than max_length" in reason


def test_cut_end_keeps_the_beginning_and_says_so(ready, tmp_path, tokenizers):
    found = ready([row("q", "z " * 99)], max_length=40, overlong="cut_end")
    assert fates(tmp_path)[0][0] == "cut"
    assert len(found.train[0].input_ids) == 40
    end = tokenizers("chatml").convert_tokens_to_ids("<|im_end|>")
    assert found.train[0].labels[-1] not in (end, -100)


def test_split_turns_cuts_the_oldest_turns_and_keeps_the_system_prompt(ready, tokenizers, tmp_path):
    turns = [{"role": "system", "content": "Be kind"}]
    for i in range(20):
        turns += row(f"question {i}", f"answer {i}")["messages"]
    found = ready([{"messages": turns}], max_length=120, overlong="split_turns")
    (example,) = found.train
    text = tokenizers("chatml").decode(example.input_ids)
    assert text.startswith("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nquestion ")
    assert text.endswith("answer 19<|im_end|>\n")
    assert len(example.input_ids) <= 120
    outcome, reason = fates(tmp_path)[0]
    assert outcome == "cut"
    cut = int(reason.split()[2])
    assert f"question {cut // 2}<" in text
    longer = ready([{"messages": [turns[0], *turns[cut - 1 :]]}], max_length=10**4)
    assert len(longer.train[0].input_ids) > 120  # one turn more would not have fit


def test_a_template_that_rewrites_history_splits_a_row(ready, tmp_path):
    turns = row("q")["messages"] + row("r")["messages"]
    found = ready([{"messages": turns}], "qwen3")
    assert len(found.train) == 2
    assert fates(tmp_path) == [("split", "the template rewrites earlier turns")]
    assert any("one example for each trained turn" in line for line in found.describe())


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([row("q", train=False)] * 3, {}, "none of the 3 rows.*no turn is trained.*train_on: all"),
        ([row("x " * 99)], {"max_length": 30}, "longer than max_length.*Raise data.max_length"),
        ([{"text": " "}], {}, "the text is empty"),
        ([row("q")], {"eval_fraction": 0.5}, "at least 2 different rows, not 1"),
    ],
)
def test_no_row_left_is_an_error_with_the_commonest_reason(rows, settings, message, ready):
    with pytest.raises(UserError, match=message):
        ready(rows, **settings)


def test_nothing_is_half_written_when_a_row_is_refused(ready, tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*unknown role"):
        ready([row("q"), {"messages": [{"role": "boss", "content": "x"}]}])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_split_is_by_conversation_and_does_not_depend_on_the_order(ready):
    rows = [row(f"q{i % 20}") for i in range(60)]
    rows = [{"messages": r["messages"] + row("more")["messages"]} for r in rows]
    found = ready(rows, "qwen3", eval_fraction=0.25)
    train, held = ({e.row_id for e in side} for side in (found.train, found.eval))
    assert len(held) == 5
    assert len(train) == 15
    assert not train & held
    assert len(found.eval) == 5 * 3 * 2  # copies and turns stay together
    assert {e.row_id for e in ready(rows[::-1], "qwen3", eval_fraction=0.25).eval} == held


def test_rows_of_the_evaluation_file_do_not_train(ready, write, tmp_path):
    other = write([row("q1"), row("q9")], "eval.jsonl")
    found = ready([row(f"q{i}") for i in range(3)], eval_path=other)
    assert (len(found.train), len(found.eval)) == (2, 2)
    assert fates(tmp_path)[1] == ("dropped", "also in data.eval_path")
    assert [entry.split for entry in found.entries] == ["train", "none", "train", "eval", "eval"]


def test_a_limit_does_not_take_the_head_of_a_sorted_file(ready):
    rows = [row(f"q{i}") for i in range(40)]
    found = ready(rows, limit=10)
    lines = [kept.source.line for kept in found.train_rows]
    assert len(lines) == 10
    assert lines == sorted(lines)
    assert max(lines) > 20
    assert lines == [kept.source.line for kept in ready(rows, limit=10).train_rows]


def test_what_was_inferred_is_told_before_the_first_step(ready):
    rows = [row("q"), row("say </s>", "<think>\nhm\n</think>\n\nyes"), row("r", train=False)]
    found = ready(rows, "qwen2.5")
    text = "\n".join(found.describe())
    tokens = sum(len(example.input_ids) for example in found.train)
    trained = sum(example.trained for example in found.train)
    for line in (
        "format: messages",
        "rows: 3 (2 kept, 0 cut, 0 split, 1 dropped) -> 2 training and 0 evaluation examples",
        "dropped: 1 rows, no turn is trained",
        "chat template: the tokenizer's; a turn ends in '<|im_end|>'",
        "generation has to stop at '<|im_end|>'; the tokenizer's EOS is '</s>'",
        "system prompt written by the template: 'You are Tiny.'",
        "trained: the assistant's turns, each with the token that ends it",
        f"max {max(len(example.input_ids) for example in found.train)}",
        f"{trained} of {tokens} trained ({trained / tokens:.0%})",
        "reasoning: in 1 of 2 rows (50%)",
        "special tokens in messages made plain text: 1",
    ):
        assert line in text
    assert len(found.stop_token_ids) == 2


def test_a_row_with_one_turn_too_long_loses_that_turn_alone(ready, tmp_path):
    turns = row("q")["messages"] + row("r", "z " * 60)["messages"]
    for overlong in ("drop", "split_turns"):
        found = ready([{"messages": turns}], "qwen3", max_length=60, overlong=overlong)
        assert len(found.train) == 1
        outcome, reason = fates(tmp_path)[0]
        assert outcome == "cut"
        assert reason.startswith("1 of 2 turns longer than max_length")


def test_texts_need_no_chat_template(ready):
    found = ready([{"text": "The sky is <|im_end|> blue"}], "")
    assert found.template is None
    assert "special tokens in texts, left as they are: 1" in found.describe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlong": "cut"}, "data.overlong='cut' .* Did you mean 'cut_end'"),
        ({"train_on": "user"}, "data.train_on='user' is not one of assistant, all"),
        ({"eval_fraction": 1.5}, "data.eval_fraction=1.5 is outside"),
        ({"eval_fraction": 0.1, "eval_path": "x"}, "keep one"),
        ({"max_length": -1}, "data.max_length=-1 must be at least 2"),
        ({"limit": 0}, "data.limit=0 must be at least 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_ledger_as_it_was(ready, tmp_path, monkeypatch, call):
    ready([row("q")])
    before = (tmp_path / "ledger.jsonl").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, full)
    with pytest.raises(UserError, match=r"cannot write .*ledger.jsonl: No space left"):
        ready([row("q"), row("r")])
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.jsonl", "rows.jsonl"]


def test_the_four_fates_of_rows_add_up_to_the_rows_and_their_tokens(ready, tmp_path):
    turns = row("q")["messages"] + row("r", "z " * 60)["messages"]
    rows = [row("q"), row("masked", train=False), row("x " * 99), {"messages": turns}]
    rows += [{"messages": row("q")["messages"] + row("r")["messages"]}]
    found = ready(rows, "qwen3", max_length=60)
    entries = read_ledger(tmp_path / "ledger.jsonl")
    assert [entry.outcome for entry in entries] == ["kept", "dropped", "dropped", "cut", "split"]
    assert [entry.line for entry in entries] == [1, 2, 3, 4, 5]
    assert all(bool(entry.reason) == (entry.outcome != "kept") for entry in entries)
    assert sum(entry.examples for entry in entries) == len(found.train) == 4
    assert sum(entry.tokens for entry in entries) == sum(len(e.input_ids) for e in found.train)
    assert sum(entry.trained_tokens for entry in entries) == sum(e.trained for e in found.train)


def test_no_row_is_trained_on_its_question_however_short_the_limit(ready, tokenizers):
    long, short = row("where is the sea " * 4, "there"), row("q", "a")
    for overlong in ("drop", "cut_end", "split_turns"):
        for limit in range(40, 130, 9):
            found = ready([long, short], max_length=limit, overlong=overlong)
            for example in found.train:
                labels = [label for label in example.labels if label != -100]
                assert "there<|im_end|>a<|im_end|>".find(tokenizers("chatml").decode(labels)) >= 0

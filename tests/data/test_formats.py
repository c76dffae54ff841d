"""Each format gives the same row as the conversation it stands for; what is odd is named."""

from __future__ import annotations

import pytest

from inlay.core.errors import UserError
from inlay.data.formats import FORMATS, recognize
from inlay.data.messages import ALIASES
from inlay.data.rows import Chat, Completion, Source, Text

HERE = Source("rows.jsonl", 7)
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def parse(raw):
    return FORMATS[recognize(raw, HERE)](raw, HERE)


def turns(row):
    return [(message.role, message.content) for message in row.messages]


ROWS = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "prompt_completion": {"prompt": [USER], "completion": [ANSWER]},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_format_of_a_conversation_gives_the_same_row(name):
    assert recognize(ROWS[name], HERE) == name
    row = parse(ROWS[name])
    assert turns(row) == [("user", "q"), ("assistant", "a")]
    assert row.id == parse(ROWS["messages"]).id


def test_null_columns_of_a_preference_do_not_make_a_row_one():
    assert recognize({"messages": [USER], "chosen": None, "rejected": None}, HERE) == "messages"


def test_conversations_with_role_and_content_are_messages():
    assert recognize({"conversations": [USER, ANSWER]}, HERE) == "messages"


@pytest.mark.parametrize("alias", [name for name in ALIASES if name != "function_call"])
def test_role_names_of_other_tools_are_mapped(alias):
    raw = {"conversations": [{"from": "human", "value": "q"}, {"from": alias, "value": "x"}]}
    assert turns(parse(raw))[1] == (ALIASES[alias], "x")


def test_a_function_call_becomes_the_assistants_tool_call():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    row = parse({"conversations": [{"from": "human", "value": "q"}, call]})
    assert row.messages[1].role == "assistant"
    assert row.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_alpaca_joins_input_and_carries_system_and_history():
    raw = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["b", "c"]]}
    assert [content for _, content in turns(parse(raw))] == ["s", "b", "c", "q\ni", "a"]


def test_alpaca_text_is_stanfords_preamble():
    row = FORMATS["alpaca_text"]({"instruction": "q", "input": "i", "output": "a"}, HERE)
    assert row.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nq\n\n### Input:\ni\n\n### Response:\n"
    )
    assert row.completion == "a"


def test_texts_and_completions_are_recognized():
    assert parse({"text": "x"}) == Text("x", HERE)
    assert parse({"prompt": "x", "completion": " y"}) == Completion("x", " y", HERE)
    assert parse({"query": "x", "response": " y"}) == Completion("x", " y", HERE)


def test_messages_of_a_prompt_are_not_trained():
    row = parse({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert [message.train for message in row.messages] == [False, False, False, None]


FLAGS = [
    ({"train": False}, False, 1.0),
    ({"training": True}, True, 1.0),
    ({"loss": False}, False, 1.0),
    ({"loss": 1}, True, 1.0),
    ({"weight": 0}, False, 1.0),
    ({"weight": 1}, True, 1.0),
    ({"loss_weight": 0.5}, True, 0.5),
    ({"loss_scale": 2.0}, True, 2.0),
    ({"masked": True}, False, 1.0),
    ({"masked": False}, True, 1.0),
    ({"train": None}, None, 1.0),
    ({}, None, 1.0),
]


@pytest.mark.parametrize(("flag", "train", "weight"), FLAGS)
def test_the_flags_of_other_tools_mean_train(flag, train, weight):
    message = parse({"messages": [USER, {**ANSWER, **flag}]}).messages[1]
    assert (message.train, message.weight) == (train, weight)


ODD = [
    ({"messages": []}, "messages is empty"),
    ({"messages": ["x"]}, 'message 1 must be an object with role and content, not "x"'),
    ({"messages": [{"role": "asistant", "content": "a"}]}, "unknown role 'asistant'.*'assistant'"),
    ({"messages": [{"content": "a"}]}, "unknown role None"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 has null content"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 2 has null content"),
    ({"messages": [USER, {"role": "assistant", "content": 3}]}, "content that is not text: 3"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part that is not text"),
    ({"messages": [USER, ANSWER], "images": ["a.png"]}, "images cannot be trained on"),
    ({"messages": [{**USER, "train": True}]}, "data.train_on: all"),
    ({"messages": [{**ANSWER, "train": "yes"}]}, 'train must be true or false, not "yes"'),
    ({"messages": [{**ANSWER, "weight": -1}]}, "weight must be a number of at least 0, not -1"),
    ({"messages": [{**ANSWER, "train": True, "weight": 0}]}, "flags disagree"),
    ({"messages": [{**ANSWER, "tool_calls": [{"id": "x"}]}]}, "tool call without a name"),
    ({"messages": [USER, ANSWER], "tools": "{"}, "tools is a text that is no JSON"),
    ({"messages": [USER, ANSWER], "tools": [1]}, "tools must be a list of objects"),
    ({"chosen": "a", "rejected": "b"}, "preference"),
    ({"messages": [USER, ANSWER], "system": 3}, "system must be text, not 3"),
    ({"messages": [{"role": "system", "content": "s"}], "system": "t"}, "two system prompts"),
    (
        {"prompt": "x", "completion": "y", "system": "s"},
        "system has no place beside a plain prompt",
    ),
    ({"prompt": "x", "completion": "y", "tools": [{}]}, "tools has no place beside a plain"),
    ({"prompt": "x", "completion": ""}, "completion is empty"),
    ({"prompt": "x", "completion": None}, "completion must be text, not null"),
    ({"prompt": [USER], "completion": "x"}, "prompt must be text"),
    ({"instruction": "x"}, "no 'output'"),
    ({"instruction": "x", "output": "y", "history": ["z"]}, "not a pair"),
    ({}, r"keys \(none\)"),
]


@pytest.mark.parametrize(("raw", "message"), ODD)
def test_a_row_that_is_odd_is_an_error_with_file_and_line(raw, message):
    with pytest.raises(UserError, match=rf"rows.jsonl:7: .*{message}"):
        parse(raw)


def test_a_rows_id_is_what_it_says_and_not_where_it_stands_or_what_it_trains():
    plain = parse({"messages": [USER, ANSWER]})
    flagged = parse({"messages": [USER, {**ANSWER, "train": False}]})
    moved = Chat(plain.messages, Source("other.jsonl", 1))
    other = parse({"messages": [USER, {**ANSWER, "content": "b"}]})
    assert plain.id == flagged.id == moved.id != other.id

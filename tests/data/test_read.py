"""Rows come out of files in order, each with its place; what cannot be read is one clear error."""

from __future__ import annotations

import gzip
import json

import pytest

from inlay.core.errors import UserError
from inlay.data.read import hub_rows, raw_rows, read_rows

CHATS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
    for i in range(3)
]


def said(rows):
    return [[message.content for message in row.messages] for row in rows]


def test_jsonl_gives_rows_with_their_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, CHATS)), encoding="utf-8")
    rows, name = read_rows(str(path))
    assert name == "messages"
    assert said(rows) == [["q0", "a0"], ["q1", "a1"], ["q2", "a2"]]
    assert [str(row.source) for row in rows] == [f"{path}:{line}" for line in (1, 3, 5)]


def test_a_json_array_gives_each_row_the_line_where_it_begins(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(CHATS, indent=2), encoding="utf-8")
    rows, _ = read_rows(str(path))
    lines = path.read_text().splitlines()
    assert len(rows) == 3
    assert all(lines[row.source.line - 1] == "  {" for row in rows)


def test_csv_gives_rows_and_cells_may_hold_line_breaks(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('instruction,input,output\n"a\nb",,c\nd,e,f\n', encoding="utf-8")
    rows, name = read_rows(str(path))
    assert name == "alpaca"
    assert said(rows) == [["a\nb", "c"], ["d\ne", "f"]]
    assert [row.source.line for row in rows] == [2, 4]


def test_a_csv_cell_may_hold_messages_as_json(tmp_path):
    path = tmp_path / "rows.csv"
    cell = json.dumps(CHATS[0]["messages"]).replace('"', '""')
    path.write_text(f'messages\n"{cell}"\n', encoding="utf-8")
    assert said(read_rows(str(path))[0]) == [["q0", "a0"]]


@pytest.fixture
def parquet(tmp_path):
    import datasets

    tools = [
        [{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}}],
        [{"type": "function", "function": {"name": "g", "parameters": {"y": "z"}}}],
    ]
    rows = [{**chat, "tools": tool} for chat, tool in zip(CHATS, tools, strict=False)]
    path = tmp_path / "set" / "train.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def test_parquet_gives_rows_without_the_nulls_that_arrow_fills_in(parquet):
    rows, _ = read_rows(str(parquet))
    assert said(rows) == [["q0", "a0"], ["q1", "a1"]]
    parameters = [row.tools[0]["function"]["parameters"] for row in rows]
    assert parameters == [{"x": 1}, {"y": "z"}]
    assert rows[1].source.line == 2


def test_a_data_set_of_the_hub_is_read_by_its_split(parquet):
    raw = list(hub_rows(str(parquet.parent), split="train"))
    assert [record["messages"][0]["content"] for record, _ in raw] == ["q0", "q1"]
    with pytest.raises(UserError, match="split 'test'"):
        list(hub_rows(str(parquet.parent), split="test"))


def test_numbers_and_mixed_contents_stay_as_they_are_in_json(write):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "add "}, {"text": "up"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1, "y": 1.0}'}}],
        },
    ]
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"z": None}}]}
    rows, _ = read_rows(write([{"messages": turns}, {"messages": [call]}]))
    assert rows[0].messages[0].content == "add up"
    arguments = rows[0].messages[1].tool_calls[0]["function"]["arguments"]
    assert json.dumps(arguments) == '{"x": 1, "y": 1.0}'
    assert rows[1].messages[0].tool_calls[0]["function"]["arguments"] == {"z": None}


def test_files_are_joined_in_order_and_may_be_of_several_formats(write):
    first = write([{"text": "x"}], "a.jsonl")
    rows, name = read_rows([first, write(CHATS, "b.jsonl")])
    assert name == "text + messages"
    assert len(rows) == 4


def test_a_text_file_is_one_row(tmp_path):
    (tmp_path / "book.txt").write_text("one\n\ntwo", encoding="utf-8")
    rows, name = read_rows(str(tmp_path / "book.txt"))
    assert (rows[0].text, name) == ("one\n\ntwo", "text")


def test_lines_end_at_line_feeds_only_and_may_be_blank_or_windows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "a\u2028b\x85c"}\r\n\r\n{"text": "d\ue000"}\r\n'.encode())
    rows, _ = read_rows(str(path))
    assert [row.text for row in rows] == ["a\u2028b\x85c", "d\ue000"]
    assert [row.source.line for row in rows] == [1, 3]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (json.dumps({"version": 1, "notes": [1], "data": CHATS}, indent=1), [7, 19, 31]),
        ("\n".join(map(json.dumps, CHATS)), [1, 2, 3]),
        (json.dumps(CHATS[:1] * 3), [1, 1, 1]),
        ("\n" + json.dumps(CHATS[0], indent=2), [2]),
    ],
    ids=["wrapped", "lines", "array", "one"],
)
def test_json_is_an_array_a_wrapped_one_or_objects_one_after_another(tmp_path, text, lines):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    rows, name = read_rows(str(tmp_path / "rows.json"))
    assert name == "messages"
    assert [row.source.line for row in rows] == lines


def test_gzipped_lines_are_read_and_a_cut_file_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress("\n".join(map(json.dumps, CHATS)).encode())
    path.write_bytes(packed)
    assert said(read_rows(str(path))[0]) == [["q0", "a0"], ["q1", "a1"], ["q2", "a2"]]
    path.write_bytes(packed[:-12])
    with pytest.raises(UserError, match=r"rows.jsonl.gz:\d: broken gzip"):
        read_rows(str(path))


def test_numbers_that_json_or_python_cannot_hold_do_no_harm_beside_the_text(write, tmp_path):
    (tmp_path / "nan.jsonl").write_text(f'{{"text": "x", "score": NaN, "n": {10**40}}}')
    assert read_rows(str(tmp_path / "nan.jsonl"))[0][0].text == "x"
    call = {"name": "f", "arguments": {"n": 10**40}}
    (row,), _ = read_rows(write([{"messages": [{"role": "assistant", "tool_calls": [call]}]}]))
    assert row.messages[0].tool_calls[0]["function"]["arguments"]["n"] == 10**40


def test_an_answer_in_a_csv_cell_may_be_json_and_stays_a_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('instruction,output\nq,"[{""x"": 1}]"\n', encoding="utf-8")
    assert said(read_rows(str(path))[0]) == [["q", '[{"x": 1}]']]


@pytest.fixture
def hub_folder(tmp_path):
    """A data set as a clone from the hub has it: a card, and parquet under data/."""
    import datasets

    folder = tmp_path / "clone"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Chats\n")
    for split, rows in (("train", CHATS), ("test", CHATS[:1])):
        part = folder / f"data/{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(part))
    return folder


def test_a_folder_laid_out_as_on_the_hub_is_a_data_set(hub_folder):
    rows, name = read_rows(str(hub_folder))
    assert (len(rows), name, str(rows[2].source)) == (3, "messages", f"{hub_folder}[train]:3")
    assert said(read_rows(str(hub_folder), split="test")[0]) == [["q0", "a0"]]
    with pytest.raises(UserError, match=r"split 'dev'.*\['train', 'test'\]"):
        read_rows(str(hub_folder), split="dev")


def test_a_folder_that_datasets_saved_is_a_data_set(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list(CHATS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": saved}).save_to_disk(str(tmp_path / "dict"))
    assert len(read_rows(str(tmp_path / "one"))[0]) == 3
    assert len(read_rows(str(tmp_path / "dict"), split="test")[0]) == 3
    with pytest.raises(UserError, match=r"data.split='train' is not one of test"):
        read_rows(str(tmp_path / "dict"))


def test_a_data_set_of_the_hub_that_cannot_be_reached_is_one_clear_error():
    with pytest.raises(UserError, match=r"some-org/chats: neither a file here nor .*the Hub"):
        read_rows("some-org/chats")


def test_columns_that_other_rows_brought_are_not_there(tmp_path):
    import datasets

    rows = [{"text": None, "prompt": "x", "completion": "y"}, {"text": "z", "prompt": None}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(UserError, match=r"rows.parquet:2: the row has no 'prompt', only 'text'"):
        read_rows(str(tmp_path / "rows.parquet"))


BROKEN = {
    "no.jsonl": (None, r"no.jsonl: no such file"),
    "empty.jsonl": (b"", "the file is empty"),
    "empty.json": (b" \n", "the file is empty"),
    "array.json": (b"[]", "the file is empty"),
    "empty.csv": (b"", "the file is empty"),
    "empty.txt": (b" ", "the file is empty"),
    "a.jsonl": (b'{"text": "x"}\n{"text": }\n', r"a.jsonl:2: broken JSON at column 10"),
    "cut.jsonl": (b'{"text": "x"}\n{"text": "y', r"cut.jsonl:2: broken JSON"),
    "b.json": (b'[{"text": "x"},\n\n{"text": }]', r"b.json:3: broken JSON at column 10"),
    "comma.json": (b'[{"text": "x"}\n{"text": "y"}]', r"comma.json:2: .*comma is missing"),
    "open.json": (b'[{"text": "x"},\n', r"open.json:2: .*array is not closed"),
    "lists.json": (
        b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}',
        r"lists.json:1: .*2 lists \(a, b",
    ),
    "more.json": (
        b'[{"text": "x"}]\n{"text": "y"}',
        r"more.json:2: .*follows the end of the array",
    ),
    "second.json": (b'{"text": "x"}\n{"text": }', r"second.json:2: broken JSON at column 10"),
    "list.jsonl": (b"[1]\n", r"list.jsonl:1: a row is an object"),
    "latin.jsonl": (b'{"text": "x"}\n{"text": "\xe9"}', r"latin.jsonl:2: byte 0xe9 is not UTF-8"),
    "more.csv": (b"text\na\nb,c\n", r"more.csv:3: the row has more cells"),
    "fewer.csv": (b"text,more\na,b\nc\n", r"fewer.csv:3: the row has fewer cells"),
    "quote.csv": (b'text\n"a\n', r"quote.csv:\d: broken CSV"),
    "latin.csv": (b"text\n" + b"x\n" * 9000 + b"caf\xe9\n", r"latin.csv:9002: byte 0xe9 is not"),
    "wide.jsonl": ('{"text": "x"}'.encode("utf-16"), r"wide.jsonl:1: byte 0xff is not UTF-8"),
    "digits.jsonl": (b'{"n": ' + b"9" * 5000 + b"}", r"digits.jsonl:1: .*thousands of digits"),
    "digits.json": (b'[{"n": ' + b"9" * 5000 + b"}]", r"digits.json:1: .*thousands of digits"),
    "nan.jsonl": (b'{"text": NaN}', r"nan.jsonl:1: text must be text, not NaN"),
    "null.jsonl": (b"null", r"null.jsonl:1: a row is an object {...}, not null"),
    "plain.jsonl.gz": (b"{}", r"plain.jsonl.gz:1: broken gzip"),
    "no.parquet": (b"PAR1", r"no.parquet: cannot be read as parquet"),
    "rows.xlsx": (b"x", r"'.xlsx' is not one of .jsonl"),
    "half.jsonl": (b'{"text": "\\ud800"}', r"half.jsonl:1: .*\\ud800, half of a surrogate pair"),
    "deep.jsonl": (b"[" * 10**6, r"deep.jsonl:1: the JSON is nested too deeply"),
    "deep.json": (b"[" * 10**6, r"deep.json:1: the JSON is nested too deeply"),
    "keys.jsonl": (b'{"txt": "x"}', r"keys.jsonl:1: .*Did you mean 'text'"),
    "other.jsonl": (b'{"text": "x"}\n{"prompt": "y"}', r"other.jsonl:2: the row has no 'text'"),
    "type.jsonl": (b'{"text": 1}', r"type.jsonl:1: text must be text, not 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_an_error_that_says_where(name, tmp_path):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        [row.id for row in read_rows(str(tmp_path / name))[0]]


def test_a_file_that_is_nearly_named_is_proposed(write, tmp_path):
    write([{"text": "x"}], "chats.jsonl")
    with pytest.raises(UserError, match=r"Did you mean 'chats.jsonl'"):
        read_rows(str(tmp_path / "chat.jsonl"))


def test_a_directory_is_refused_with_the_files_it_holds(write, tmp_path):
    write([{"text": "x"}], "chats.jsonl")
    with pytest.raises(UserError, match=r"is a directory; it holds chats.jsonl"):
        list(raw_rows(str(tmp_path)))


def test_no_path_and_an_unknown_format_are_refused(write):
    with pytest.raises(UserError, match=r"data.path is empty"):
        read_rows("")
    with pytest.raises(UserError, match=r"'sharegtp' .* Did you mean 'sharegpt'"):
        read_rows(write([{"text": "x"}]), "sharegtp")


@pytest.mark.parametrize("field", ["name", "split", "revision"])
def test_what_only_a_hub_data_set_has_is_refused_for_a_file(tmp_path, field):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a document"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=f"data.{field} is 'test', but .*is a file"):
        read_rows([str(path)], **{field: "test"})

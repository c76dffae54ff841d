"""Bad input of `inlay train`: one clear error, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from tests.cli.conftest import SMALL, chat

ROWS = {
    "empty.jsonl": "",
    "broken.jsonl": chat("a", "b") + '{"messages": [}\n',
    "role.jsonl": json.dumps({"messages": [{"role": "wizard", "content": "x"}]}) + "\n",
    "null.jsonl": chat("a", "b") + chat("x", None),
    "shape.jsonl": '{"nothing": "known"}\n',
    "list.jsonl": "[1, 2]\n",
    "binary.jsonl": None,
}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--data nope.jsonl", ["nope.jsonl: no such file"]),
        ("--data chat.jsonl", ["Did you mean 'chats.jsonl'?"]),
        ("--data empty.jsonl", ["empty.jsonl", "empty", "at least one row"]),
        ("--data folder", ["folder", "directory", "chats.jsonl"]),
        ("--data broken.jsonl", ["broken.jsonl:2", "broken JSON"]),
        ("--data role.jsonl", ["role.jsonl:1", "'wizard'", "known are"]),
        ("--data null.jsonl", ["null.jsonl:2", "null content"]),
        ("--data shape.jsonl", ["shape.jsonl:1"]),
        ("--data list.jsonl", ["list.jsonl:1", "object"]),
        ("--data binary.jsonl", ["binary.jsonl:1", "UTF-8"]),
        ("--data nobody/nothing", ["nobody/nothing", "hub"]),
        ("--adapter.r 8", ["data.path is empty"]),
        ("--data chats.jsonl --adapter.r -3", ["r=-3", "command line"]),
        ("--data chats.jsonl --adapter.rr 3", ["'--adapter.rr'", "'--adapter.r'"]),
        ("--data chats.jsonl --train.max_steps two", ["train.max_steps", "'two'", "whole number"]),
        ("--data chats.jsonl --adapter.target_modules q_prj", ["'q_prj'", "'q_proj'"]),
        ("--data chats.jsonl --adapter.target_modules q_prj,v_proj", ["'q_prj'", "'q_proj'"]),
        ("--data chats.jsonl --base_model ./nope", ["./nope", "no such folder"]),
        ("--data chats.jsonl --base_model nobody/nothing", ["nobody/nothing", "cannot be loaded"]),
        ("--data chats.jsonl --base_model folder", ["folder", "config.json"]),
        ("--data chats.jsonl --device cuda:77", ["cuda:77"]),
        ("--data chats.jsonl --quantize nf5", ["nf5", "nf4"]),
        ("--data chats.jsonl --quantize nf4 --adapter full", ["nf4", "adapter: lora"]),
        ("--data chats.jsonl --data.format foo", ["foo"]),
        ("--data chats.jsonl --data.eval_fraction 3", ["eval_fraction=3"]),
        ("--data chats.jsonl --data.chat_template nope.jinja", ["nope.jinja"]),
        ("--data chats.jsonl --train.early_stopping_patience 2", ["held-out rows"]),
    ],
)
def test_a_mistake_is_one_error_and_leaves_no_folder(inlay, place, words, told):
    (place / "folder").mkdir()
    (place / "folder" / "chats.jsonl").write_text(chat("a", "b"))
    for name, text in ROWS.items():
        (place / name).write_bytes(b'{"text": "\xff"}\n' if text is None else text.encode())
    code, out, errors = inlay("train", *words.split(), "--output_dir", "made/run")
    assert code == 2, out + errors
    assert [part for part in told if part not in errors] == [], errors
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 2
    assert not (place / "made").exists()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (chat("x", "y", train=False), ["no turn is trained", "rows.jsonl:1", "data.train_on"]),
        (chat("x", "y " * 3000), ["longer than max_length", "1024", "data.max_length"]),
    ],
)
def test_where_no_row_is_left_the_ledger_alone_says_why(inlay, place, row, told):
    Path("rows.jsonl").write_text(row * 2)
    code, _, errors = inlay("train", "--data", "rows.jsonl", "--output_dir", "run")
    assert code == 2
    assert [part for part in told if part not in errors] == [], errors
    assert [path.name for path in Path("run").iterdir()] == ["ledger.jsonl"]
    ledger = [json.loads(line) for line in Path("run/ledger.jsonl").read_text().splitlines()]
    assert [entry["outcome"] for entry in ledger] == ["dropped", "dropped"]
    # and it is no obstacle to the next start
    code, _, _ = inlay("train", "--data", "chats.jsonl", *SMALL, "--output_dir", "run")
    assert code == 0


def test_an_output_folder_that_is_a_file_is_refused(inlay):
    code, _, errors = inlay("train", "--data", "chats.jsonl", "--output_dir", "chats.jsonl")
    assert code == 2
    assert "chats.jsonl is a file" in errors


def test_an_output_folder_that_cannot_be_made_is_told(inlay):
    code, _, errors = inlay("train", "--data", "chats.jsonl", "--output_dir", "/proc/nope/run")
    assert code == 2
    assert "/proc/nope" in errors


def test_a_full_disk_is_told_and_leaves_no_half_checkpoint(inlay, place):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # larger than the ledger and the lines of events, smaller than a checkpoint
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code, _, errors = inlay("train", "--data", "chats.jsonl", *SMALL, "--output_dir", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2, errors
    assert "no space left" in errors
    assert "Traceback" not in errors
    assert not [path for path in Path("run").rglob("*") if "partial" in path.name]
    assert not Path("run/adapter").exists()
    # with space again, the same command goes on
    code, _, _ = inlay("train", "--data", "chats.jsonl", *SMALL, "--output_dir", "run")
    assert code == 0


def test_rows_that_give_no_finite_loss_stop_the_run_by_name(inlay, place):
    code, _, errors = inlay(
        *("train", "--data", "chats.jsonl", *SMALL),
        *(
            "--train.learning_rate",
            "1e38",
            "--train.max_grad_norm",
            "0",
            "--train.warmup_ratio",
            "0",
        ),
    )
    assert code == 2
    assert "chats.jsonl:" in errors
    assert "train.learning_rate" in errors

"""`inlay train`: what it prints, in lines and in JSON."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import SMALL


def test_one_option_is_enough(inlay):
    code, out, errors = inlay("train", "--data", "chats.jsonl", *SMALL)
    assert (code, errors) == (0, "")
    for part in (
        "command line: ",
        "inlay-tiny: LlamaForCausalLM",
        "format: messages",
        "parameters train",
        "step 2 of 2: loss",
        "held-out rows",
        "loss a token",
        "exact match, 2 answers",
        "runs/chats",
        "inlay chat runs/chats",
    ):
        assert part in out, part
    assert out.index("format: messages") < out.index("step 1 of 2")
    assert (Path("runs") / "chats" / "adapter" / "adapter_model.safetensors").is_file()


def test_json_is_one_event_a_line_and_nothing_else(inlay):
    code, out, errors = inlay("train", "--data", "chats.jsonl", *SMALL, "--json")
    assert (code, errors) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events]
    assert [kind for kind in kinds if kind not in ("notice", "save")] == [
        "facts",
        "start",
        "step",
        "step",
        "eval",
        "end",
        "result",
    ]
    result = events[-1]
    assert result["adapter"]["loss"] > 0
    assert Path(result["trained"]).is_dir()


def test_other_tools_names_are_taken_with_a_notice(inlay):
    code, out, _ = inlay("train", "--dataset", "chats.jsonl", "--lora_r", "2", *SMALL)
    assert code == 0
    assert "lora_r (command line) is adapter.r here" in out
    assert "dataset (command line) is data.path here" in out


def test_a_second_start_shows_the_results_and_overwrite_starts_anew(inlay):
    words = ["train", "--data", "chats.jsonl", *SMALL]
    inlay(*words)
    code, out, _ = inlay(*words)
    assert code == 0
    assert "--overwrite starts it anew" in out
    assert "loss a token" in out
    assert "step 1 of 2" not in out
    code, out, _ = inlay(*words, "--overwrite")
    assert (code, "step 1 of 2" in out) == (0, True)


def test_a_row_longer_than_the_limit_is_dropped_and_the_ledger_says_so(inlay):
    lines = Path("chats.jsonl").read_text()
    long = json.dumps(
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y " * 300},
            ]
        }
    )
    Path("chats.jsonl").write_text(lines + long + "\n")
    code, out, _ = inlay("train", "--data", "chats.jsonl", "--data.max_length", "64", *SMALL)
    assert code == 0
    assert "dropped: 1 rows, longer than max_length" in out
    ledger = [json.loads(line) for line in Path("runs/chats/ledger.jsonl").read_text().splitlines()]
    assert [(e["line"], e["outcome"]) for e in ledger if e["outcome"] != "kept"] == [
        (13, "dropped")
    ]

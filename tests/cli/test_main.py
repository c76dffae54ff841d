"""The command `inlay`: help, exit codes, and what an error looks like."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from inlay.cli import commands, train


def test_the_commands_are_the_files(inlay):
    assert commands() == ["train", "compare", "chat", "eval", "merge", "quantize", "info"]
    code, out, _ = inlay("--help")
    assert code == 0
    assert [name for name in commands() if f"\n  {name} " not in out] == []


def test_the_help_fits_a_terminal_of_80_columns(inlay, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in ([], *([command] for command in commands())):
        lines = inlay(*words, "--help")[1].splitlines()
        # a default such as a list of names may be longer; sentences are not
        assert [line for line in lines if len(line) > 80 and not line.startswith("  --")] == []


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help_with_examples(inlay, command):
    code, out, _ = inlay(command, "--help")
    assert code == 0
    assert f"inlay {command}" in out
    assert "--debug" in out


def test_the_help_of_train_lists_every_key_with_default_and_meaning(inlay):
    from inlay.config.schema import keys

    _, out, _ = inlay("train", "--help")
    shown = [key for key in keys().values() if key.shown]
    assert [key.name for key in shown if f"\n  --{key.name} " not in out] == []
    assert "--train.learning_rate 0.0002\n      Peak learning rate" in out


def test_the_help_answers_at_once():
    began = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-m", "inlay", "--help"], capture_output=True, check=False
    )
    assert ran.returncode == 0
    # 0.05 s on an idle core; torch alone takes twenty times that
    assert time.monotonic() - began < 1.0


def test_the_version_is_the_packages(inlay):
    from inlay import __version__

    assert inlay("--version") == (0, f"inlay {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["chat", "--promt", "x"], "Did you mean '--prompt'?"),
        (["merge"], "the following arguments are required"),
        (["train"], "give a recipe or at least --data FILE"),
        (["train", "a.yaml", "b.yaml"], "one recipe"),
        (["train", "-x"], "'-x'"),
        (["chat", "--temperature", "hot"], "invalid float"),
        (["chat", "--max_new_tokens", "0"], "--max_new_tokens is 0; it must be 1 or more"),
        (["chat", "--temperature", "nan"], "--temperature is nan; it must be 0 or more"),
        (["chat", "--temperature", "inf"], "--temperature is inf"),
        (["chat", "--prompt", "a", "--prompt", "b"], "--prompt is given twice: 'a' and 'b'"),
        (["eval", "x", "--answers", "-1"], "--answers is -1; it must be 0 or more"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(inlay, words, told):
    code, out, errors = inlay(*words)
    assert (code, out) == (2, "")
    assert errors.startswith("error: ")
    assert told in errors
    assert "Traceback" not in errors


def test_our_own_mistake_is_exit_code_1_without_a_traceback(inlay, monkeypatch):
    def broken(_):
        raise RuntimeError("boom")

    monkeypatch.setattr(train, "settings", broken)
    code, _, errors = inlay("train", "--data", "chats.jsonl")
    assert code == 1
    assert "RuntimeError: boom" in errors
    assert "--debug shows the traceback" in errors
    assert "Traceback" not in errors


def test_debug_shows_the_traceback(inlay):
    code, _, errors = inlay("train", "--debug", "--data", "nope.jsonl")
    assert code == 2
    assert "Traceback" in errors


def test_ctrl_c_is_one_word(inlay, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "settings", interrupted)
    assert inlay("train", "--data", "chats.jsonl") == (130, "", "interrupted\n")


def test_with_json_an_error_is_a_line_of_json(inlay):
    code, out, errors = inlay("train", "--data", "nope.jsonl", "--json")
    line = json.loads(out)
    assert (code, errors) == (2, "")
    assert (line["event"], line["kind"], line["code"]) == ("error", "mistake", 2)
    assert "nope.jsonl" in line["text"]


def test_the_module_is_the_command():
    ran = subprocess.run(
        [sys.executable, "-m", "inlay", "trian"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "Did you mean 'train'?" in ran.stderr

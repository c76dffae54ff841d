"""What a run tells on a terminal, in a file, and where it is cut short."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from inlay.run.report import Terminal
from inlay.run.tables import answers_table, scores_table

STEP = {
    "event": "step",
    "steps": 100,
    "loss": 1.5,
    "tokens_per_s": 2000.0,
    "memory_mb": 300.0,
    "eta_s": 65.0,
}


def terminal(*, is_terminal):
    report = Terminal(io.StringIO())
    report.console = Console(
        file=report.console.file,
        force_terminal=is_terminal,
        width=100,
        highlight=False,
        soft_wrap=True,
    )
    return report


def test_a_terminal_shows_a_bar_with_loss_speed_time_and_memory():
    with terminal(is_terminal=True) as report:
        report.event({"event": "start", "step": 0, "steps": 100})
        report.event({**STEP, "step": 50})
        report.bar.refresh()
        said = report.console.file.getvalue()
    for part in ("50/100", "loss 1.5", "2,000 tokens/s", "300 MiB", "1:05 left"):
        assert part in said, part
    assert report.bar is None


def test_a_file_gets_twenty_lines_and_not_one_a_step():
    with terminal(is_terminal=False) as report:
        report.event({"event": "start", "step": 0, "steps": 100})
        for step in range(1, 101):
            report.event({**STEP, "step": step})
    lines = report.console.file.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[-1].startswith("step 100 of 100: loss 1.5")


def test_the_bar_is_taken_away_where_the_run_breaks_off():
    report = terminal(is_terminal=True)

    def broken():
        with report:
            report.event({"event": "start", "step": 0, "steps": 100})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert report.bar is None


def test_a_run_that_ends_early_says_why():
    with terminal(is_terminal=False) as report:
        end = {"event": "end", "stopped": "early", "step": 9, "total_steps": 20}
        report.event({**end, "best_step": 5, "best_eval_loss": 1.25})
    said = report.console.file.getvalue()
    assert "ended early, at step 9 of 20" in said
    assert "lowest at step 5, 1.25" in said


def test_a_resumed_run_says_where_it_goes_on():
    with terminal(is_terminal=False) as report:
        report.event({"event": "resume", "step": 40, "steps": 100})
    assert "resumed at step 40 of 100" in report.console.file.getvalue()


def test_text_of_rows_is_printed_as_it_is():
    answers = [{"prompt": "[red]x[/]", "expected": "[a]", "answer": "[b]" + "y" * 500}]
    evaluation = {"held_out": 1, "base": {"answers": answers}, "adapter": {"answers": answers}}
    console = Console(file=io.StringIO(), width=200)
    console.print(answers_table(evaluation, 3))
    said = console.file.getvalue()
    assert "[red]x[/]" in said
    assert "[b]" in said
    assert "..." in said


def test_where_nothing_was_measured_there_is_no_table():
    assert scores_table({"held_out": 0, "base": None, "adapter": None}) is None
    assert answers_table({"base": {"loss": 1.0}}, 4) is None
    assert (
        scores_table({"base": {"loss": 1.0, "perplexity": None}, "adapter": {"loss": 0.5}})
        is not None
    )

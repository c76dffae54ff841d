"""What a run tells while it goes: to a terminal, to a file as plain lines, or as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any, Protocol

from inlay.run.folder import LEDGER, PLOT, Run
from inlay.run.tables import answers_table, scores_table
from inlay.train.events import Event
from inlay.train.progress import Outcome


class Report(Protocol):
    """The reader of a run, told everything once; used as a context while the run goes."""

    def __enter__(self) -> Any:
        """Begin."""

    def __exit__(self, *_: Any) -> None:
        """Take back what was drawn on the terminal, however the run ended."""

    def notice(self, text: str) -> None:
        """Take one line that the user should know."""

    def facts(self, facts: Mapping[str, Sequence[str]]) -> None:
        """Take what was inferred, heading -> lines, before the first step."""

    def event(self, event: Event) -> None:
        """Take a line of events.jsonl."""

    def stopped(self, run: Run, outcome: Outcome) -> None:
        """Take that the run was told to stop, and did."""

    def result(self, run: Run) -> None:
        """Take that the run has ended, and all of it is written."""


class JsonLines:
    """One JSON object a line; those of events.jsonl, and `notice`, `facts`, `stopped`, `result`."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        """Write to `stream` (default: standard output)."""
        self.stream = stream or sys.stdout

    def __enter__(self) -> JsonLines:
        """Begin."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Have nothing to take back."""

    def notice(self, text: str) -> None:
        """Write the text."""
        self.event({"event": "notice", "text": text})

    def facts(self, facts: Mapping[str, Sequence[str]]) -> None:
        """Write headings and lines."""
        self.event({"event": "facts", **facts})

    def event(self, event: Event) -> None:
        """Write it as it is."""
        print(json.dumps(event, ensure_ascii=False, default=str), file=self.stream, flush=True)

    def stopped(self, run: Run, outcome: Outcome) -> None:
        """Write where it stands."""
        where = {"folder": str(run.folder), "step": outcome.step, "steps": outcome.total_steps}
        self.event({"event": "stopped", "by": outcome.stopped, **where})

    def result(self, run: Run) -> None:
        """Write the scores and where everything is."""
        self.event(
            {
                "event": "result",
                "folder": str(run.folder),
                "trained": str(run.trained),
                **without_answers(run.evaluation or {}),
            }
        )


def without_answers(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation with its scores alone: no answers, no digests of the data."""
    return {
        side: {k: v for k, v in found.items() if k != "answers"}
        if isinstance(found, dict)
        else found
        for side, found in evaluation.items()
        if side != "data"
    }


class Terminal:
    """Lines, a progress bar where there is a terminal, and tables at the end."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        """Write to `stream` (default: standard output)."""
        from rich.console import Console

        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.bar: Any = None
        self.told = 0

    def __enter__(self) -> Terminal:
        """Begin."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line as it is, without reading markup in it."""
        self.console.print(text, style=style, markup=False)

    def notice(self, text: str) -> None:
        """Print the line."""
        self.line(text, style="yellow")

    def facts(self, facts: Mapping[str, Sequence[str]]) -> None:
        """Print headings and lines in two columns."""
        width = max(map(len, facts)) + 2
        for heading, lines in facts.items():
            for i, text in enumerate(lines):
                self.line(f"{heading if i == 0 else '':{width}}{text}")

    def event(self, event: Event) -> None:
        """Move the bar, or print a line."""
        match event["event"]:
            case "start" | "resume":
                if event["event"] == "resume":
                    self.notice(f"resumed at step {event['step']} of {event['steps']}")
                self._begin(event)
            case "step":
                self._step(event)
            case "eval":
                self.line(
                    f"step {event['step']}: held-out loss {_number(event['loss'])}, "
                    f"perplexity {_number(event['perplexity'])}"
                )
            case "notice":
                self.notice(event["text"])
            case "end" | "nonfinite":
                self.__exit__()
                if event.get("stopped") == "early":
                    self.notice(
                        f"ended early, at step {event['step']} of {event['total_steps']}: the "
                        f"held-out loss was lowest at step {event['best_step']}, "
                        f"{_number(event['best_eval_loss'])}"
                    )

    def stopped(self, run: Run, outcome: Outcome) -> None:
        """Print where it stands and how to go on."""
        self.notice(
            f"stopped at step {outcome.step} of {outcome.total_steps} and saved; "
            f"the same command goes on from there (or: inlay train {run.folder / 'config.yaml'})"
        )

    def result(self, run: Run) -> None:
        """Print scores, answers side by side, and where everything is."""
        found, shown = run.evaluation or {}, run.config.evaluate.shown
        name = run.trained.name
        for table in (answers_table(found, shown, name), scores_table(found, name)):
            if table is not None:
                self.console.print()
                self.console.print(table, soft_wrap=False)
        self.console.print()
        self.line(f"run      {run.folder}  (ledger of rows: {run.folder / LEDGER})")
        self.line(f"{run.trained.name:9}{run.trained}")
        if (run.folder / PLOT).is_file():
            self.line(f"loss     {run.folder / PLOT}")
        command = "eval" if run.config.objective.task == "SEQ_CLS" else "chat"
        self.line(f"try it   inlay {command} {run.folder}")

    def _begin(self, event: Event) -> None:
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[told]}"),
        )
        self.bar = Progress(*columns, console=self.console)
        self.bar.add_task("", total=event["steps"], completed=event["step"], told="")
        self.bar.start()

    def _step(self, event: Event) -> None:
        minutes, seconds = divmod(int(event["eta_s"]), 60)
        told = (
            f"loss {_number(event['loss'])}  {event['tokens_per_s']:,.0f} tokens/s  "
            f"{event['memory_mb']:,.0f} MiB  {minutes}:{seconds:02d} left"
        )
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=event["step"], told=told)
            return
        # not a terminal: twenty lines, not a thousand
        every = max(1, event["steps"] // 20)
        if event["step"] == event["steps"] or event["step"] >= self.told + every:
            self.told = event["step"]
            self.line(f"step {event['step']} of {event['steps']}: {told}")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"

"""What a comparison tells while it goes: a line a run and a bar, or JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any, Protocol

from inlay.run.comparison import MEASURES, Comparison, Result
from inlay.run.folder import Run
from inlay.run.peak import Peak
from inlay.run.report import JsonLines
from inlay.train.events import Event
from inlay.train.progress import Outcome


class View(Protocol):
    """The reader of a comparison; used as a context while it goes."""

    def __enter__(self) -> Any:
        """Begin."""

    def __exit__(self, *_: Any) -> None:
        """Take back what was drawn on the terminal."""

    def notice(self, text: str) -> None:
        """Take one line that the user should know."""

    def begin(self, runs: int) -> None:
        """Take how many runs there are to be."""

    def event(self, label: str, event: Event) -> None:
        """Take a line of a run's events.jsonl."""

    def done(self, label: str, result: Result) -> None:
        """Take what came out of a run."""

    def result(self, comparison: Comparison) -> None:
        """Take that all runs have ended, and the report is written."""


class Watched:
    """The report of one run: hands its events on, and measures the memory that training takes."""

    def __init__(self, view: View | None, label: str, peak: Peak | None) -> None:
        """Tell `view`, if there is one."""
        self.view, self.label, self.peak = view, label, peak
        self.peak_mb: float | None = None

    def __enter__(self) -> Watched:
        """Begin."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop measuring, however the run ended."""
        if self.peak is not None:
            self.peak.stop()

    def notice(self, text: str) -> None:
        """Tell nothing: what matters of it, the comparison tells."""

    def facts(self, facts: Mapping[str, Sequence[str]]) -> None:
        """Tell nothing: the runs' folders have it."""

    def event(self, event: Event) -> None:
        """Hand it on."""
        if self.peak is not None:
            if event["event"] in ("start", "resume"):
                self.peak.start()
            elif event["event"] in ("end", "nonfinite"):
                self.peak_mb = self.peak.stop()
        if self.view is not None:
            self.view.event(self.label, event)

    def stopped(self, run: Run, outcome: Outcome) -> None:
        """Tell nothing: the comparison does."""

    def result(self, run: Run) -> None:
        """Tell nothing: the comparison does."""


class JsonView:
    """One JSON object a line: those of the runs, with "run"; `done` for each, `result` last."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        """Write to `stream` (default: standard output)."""
        self.lines = JsonLines(stream)

    def __enter__(self) -> JsonView:
        """Begin."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Have nothing to take back."""

    def notice(self, text: str) -> None:
        """Write the text."""
        self.lines.notice(text)

    def begin(self, runs: int) -> None:
        """Write the number."""
        self.lines.event({"event": "begin", "runs": runs})

    def event(self, label: str, event: Event) -> None:
        """Write it with its run."""
        self.lines.event({**event, "run": label})

    def done(self, label: str, result: Result) -> None:
        """Write what was measured."""
        told = {name: getattr(result, name) for name in ("name", "rate", "seed", "folder")}
        told |= {"scores": dict(result.scores), "seconds": result.seconds, "failed": result.failed}
        self.lines.event({"event": "done", "run": label, **told})

    def result(self, comparison: Comparison) -> None:
        """Write the lines of the report, and where it is."""
        best = comparison.to_json()["best"]
        self.lines.event({"event": "result", "folder": comparison.folder, "best": best})


class Terminal:
    """A line a run, bars where there is a terminal, and a table at the end."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        """Write to `stream` (default: standard output)."""
        from rich.console import Console

        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.bar: Any = None
        self.runs = self.ended = 0

    def __enter__(self) -> Terminal:
        """Begin."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Take the bars away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def notice(self, text: str) -> None:
        """Print the line."""
        self.console.print(text, style="yellow", markup=False)

    def begin(self, runs: int) -> None:
        """Make two bars: of the runs, and of the steps of one."""
        self.runs = runs
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[told]}"),
        )
        self.bar = Progress(*columns, console=self.console)
        self.bar.add_task("runs", total=runs, told="")
        self.bar.add_task("", total=1, told="", visible=False)
        self.bar.start()

    def event(self, label: str, event: Event) -> None:
        """Move the bar."""
        if self.bar is None:
            return
        of_steps = self.bar.task_ids[1]
        if event["event"] in ("start", "resume"):
            first = {"completed": event["step"], "total": event["steps"], "told": ""}
            self.bar.update(of_steps, description=label, visible=True, **first)
        elif event["event"] == "step":
            loss = event["loss"]
            told = "" if loss is None else f"loss {loss:.4g}"
            self.bar.update(of_steps, completed=event["step"], told=told)

    def done(self, label: str, result: Result) -> None:
        """Print what came out."""
        self.ended += 1
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.ended)
        at = f"[{self.ended}/{self.runs}] {label}: "
        if result.failed:
            self.notice(f"{at}not trained: {result.failed}")
            return
        scores = [
            f"{MEASURES[name][0]} {value:{MEASURES[name][1]}}"
            for name, value in result.scores.items()
            if name in MEASURES
        ]
        line = f"{at}{', '.join(scores)}; {result.steps} steps in {result.seconds:.0f} s"
        self.console.print(line, markup=False)

    def result(self, comparison: Comparison) -> None:
        """Print the table, and where the report is."""
        from inlay.run.compare_report import REPORT, cells

        self.__exit__()
        from rich.box import SIMPLE
        from rich.table import Table

        heads, rows = cells(comparison)
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print()
        self.console.print(table, soft_wrap=False)
        for ending in (".md", ".html", ".json"):
            self.console.print(f"report  {comparison.folder}/{REPORT}{ending}", markup=False)

"""The report of a comparison: a table as markdown and JSON, plots, and a page that holds it all."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inlay.checkpoint.atomic import write_bytes, write_text
from inlay.config.dump import in_line
from inlay.run.comparison import MEASURES, Comparison, Line

REPORT = "report"
PLOTS: Mapping[str, tuple[str, str, bool]] = {
    "parameters": ("trainable", "trained parameters", True),
    "memory": ("memory_mb", "memory of training, MiB", False),
    "time": ("seconds", "training time, s", False),
}
"""Plot -> what stands on its axis (a field of a line), how that is called, and whether in logs."""


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write report.json, report.md, quality-*.png and report.html into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {**comparison.to_json(), "machine": machine()}
    write_text(folder / f"{REPORT}.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    images = plots(comparison)
    for name, image in images.items():
        write_bytes(folder / name, image)
    write_text(folder / f"{REPORT}.md", markdown(comparison, list(images)))
    write_text(folder / f"{REPORT}.html", page(comparison, images))


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the heads of the table's columns, and its rows."""
    lines = comparison.best()
    measures = [name for name in MEASURES if any(name in line.scores for line in lines)]
    heads = ["method", "rate", "parameters", "share"]
    heads += [MEASURES[name][0] for name in measures] + ["seconds", "MiB"]
    rows = []
    base = comparison.base_scores()
    if base:
        found = [_value(name, base.get(name)) for name in measures]
        rows.append(["(base)", "", "0", "", *found, "", ""])
    for line in lines:
        if line.failed:
            rows.append([line.name, *["-"] * (len(heads) - 1)])
            continue
        found = [_value(name, line.scores.get(name), line.spread.get(name)) for name in measures]
        share = f"{line.trainable / comparison.total:.2%}"
        memory = "-" if line.memory_mb is None else f"{line.memory_mb:,.0f}"
        first = [line.name, f"{line.rate:g}", f"{line.trainable:,}", share]
        rows.append([*first, *found, f"{line.seconds:.1f}", memory])
    return heads, rows


def notes(comparison: Comparison) -> list[str]:
    """Return what has to be known to read the table, a sentence each."""
    lines = comparison.best()
    seeds = sorted({result.seed for result in comparison.results})
    budget = (
        f"{comparison.seconds:g} s of training each"
        if comparison.seconds
        else f"{max((line.steps for line in lines), default=0)} steps each"
    )
    where = f"the {comparison.held_out} held-out rows"
    told = [
        f"Base {comparison.base}, {comparison.total:,} parameters; {comparison.train_rows} rows to "
        f"train on; {budget}, in the same order.",
        f"Measured on {f'the rows of {comparison.test}' if comparison.test else where}, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        + (", mean and standard deviation." if len(seeds) > 1 else "."),
        "Rate is the learning rate; share, of the base's parameters; seconds, those of the steps "
        "alone; MiB, the peak of training over the loaded base.",
    ]
    shown = MEASURES[comparison.ranking]
    for line in lines:
        if len(line.tried) > 1:
            each = ", ".join(
                f"{rate:g} ({_value(comparison.ranking, score)})"
                for rate, score in sorted(line.tried.items())
            )
            told.append(
                f"Learning rates tried for {line.name}, with {shown[0]} on {where}: {each}."
            )
        if line.failed:
            told.append(f"{line.name} could not be trained: {line.failed}")
    told.append("Machine: " + ", ".join(f"{value}" for value in machine().values()) + ".")
    return told


def markdown(comparison: Comparison, images: Sequence[str]) -> str:
    """Return the report as markdown, its plots as links."""
    heads, rows = cells(comparison)
    lines = ["# Comparison", ""]
    lines += [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    lines += [_row([cell.replace("|", "\\|") for cell in row]) for row in rows]
    lines += ["", *(f"- {note}" for note in notes(comparison)), ""]
    lines += [f"![{Path(name).stem}]({name})" for name in images]
    lines += ["", "## Settings", "", "```yaml"]
    lines += [f"{key}: {in_line(value)}" for key, value in comparison.settings.items()]
    return "\n".join([*lines, "```"]) + "\n"


def page(comparison: Comparison, images: Mapping[str, bytes]) -> str:
    """Return the report as one page of HTML that needs no other file."""
    heads, rows = cells(comparison)
    body = "".join(f"<tr>{''.join(_cell(c, 'td') for c in row)}</tr>\n" for row in rows)
    pictures = "".join(
        f'<img alt="{html.escape(Path(name).stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}">\n'
        for name, image in images.items()
    )
    settings = "\n".join(f"{key}: {in_line(v)}" for key, v in comparison.settings.items())
    return _PAGE.format(
        heads="".join(_cell(head, "th") for head in heads),
        body=body,
        notes="".join(f"<li>{html.escape(note)}</li>\n" for note in notes(comparison)),
        pictures=pictures,
        settings=html.escape(settings),
    )


def plots(comparison: Comparison) -> dict[str, bytes]:
    """Return file name -> PNG: quality against parameters, memory and time."""
    lines = [line for line in comparison.best() if comparison.ranking in line.scores]
    found = {}
    for name, (key, axis, in_logs) in PLOTS.items():
        drawn = [line for line in lines if getattr(line, key) is not None]
        if drawn:
            found[f"quality-{name}.png"] = _plot(comparison, drawn, key, axis, in_logs)
    return found


def _plot(
    comparison: Comparison, lines: Sequence[Line], key: str, axis: str, in_logs: bool
) -> bytes:
    # the object interface, not pyplot: no window, no state of the caller's figures touched
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranking = comparison.ranking
    called, how, _ = MEASURES[ranking]
    factor = 100.0 if how.endswith("%") else 1.0
    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for line in lines:
        x, y = getattr(line, key), line.scores[ranking] * factor
        error = line.spread.get(ranking, 0.0) * factor
        axes.errorbar(
            [x], [y], yerr=[error] if error else None, fmt="o", capsize=3, label=line.name
        )
    base = comparison.base_scores().get(ranking)
    if base is not None:
        axes.axhline(base * factor, color="gray", linestyle=":", label="base")
    figure.legend(loc="outside right upper", fontsize=8)
    if in_logs:
        axes.set_xscale("log")
    axes.margins(x=0.18, y=0.12)
    axes.set(xlabel=axis, ylabel=f"{called}{', %' if factor > 1 else ''}")
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()


def machine() -> dict[str, Any]:
    """Return what the figures of time and memory depend on."""
    from inlay import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {
        "processor": _processor(),
        "cores": f"{os.cpu_count()} cores",
        "threads": f"{torch.get_num_threads()} threads",
        "gpu": gpu,
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}",
        "inlay": f"inlay {__version__}",
    }
    return {name: value for name, value in found.items() if value is not None}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _value(name: str, value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "-"
    how = MEASURES[name][1]
    return format(value, how) + (f" ± {spread:{how}}" if spread is not None else "")


def _row(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _cell(text: str, tag: str) -> str:
    return f"<{tag}>{html.escape(text)}</{tag}>"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Comparison</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 32%; min-width: 20rem }}
pre {{ background: #f4f4f4; padding: 1rem; overflow: auto }}
</style>
<h1>Comparison</h1>
<table>
<tr>{heads}</tr>
{body}</table>
{pictures}<ul>
{notes}</ul>
<h2>Settings</h2>
<pre>{settings}</pre>
</html>
"""

"""An evaluation for reading: scores before and after, answers of base and adapter side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scores_table(evaluation: Mapping[str, Any], name: str = "adapter") -> Any:
    """Return a table of the loss and what else was measured, or None where nothing was.

    name: what was trained, above its column.
    """
    from rich.table import Table

    before, after = evaluation.get("base") or {}, evaluation.get("adapter") or {}
    if not (before or after):
        return None
    rows = evaluation.get("held_out", 0)
    table = Table(title=f"on {rows} held-out examples", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column(name, justify="right", style="bold")
    shown = {
        "loss a row" if "accuracy" in after else "loss a token": ("loss", ".4f"),
        "perplexity": ("perplexity", ".2f"),
        "accuracy": ("accuracy", ".1%"),
        "macro-F1": ("macro_f1", ".3f"),
    }
    for label, (name, how) in shown.items():
        if name in before or name in after:
            table.add_row(label, _cell(before.get(name), how), _cell(after.get(name), how))
    answered = after.get("answered") or before.get("answered")
    if answered:
        cells = [_exact(side) for side in (before, after)]
        table.add_row(f"exact match, {answered} answers", *cells)
    return table


def answers_table(evaluation: Mapping[str, Any], limit: int, name: str = "adapter") -> Any:
    """Return a table of at most `limit` answers beside the expected ones, or None."""
    from rich.table import Table
    from rich.text import Text

    before = (evaluation.get("base") or {}).get("answers") or []
    after = (evaluation.get("adapter") or {}).get("answers") or []
    pairs = list(zip(before, after, strict=False))[:limit]
    if not pairs:
        return None
    table = Table(title="held-out rows", title_justify="left", title_style="bold", show_lines=True)
    for heading in ("asked", "expected", "base", name):
        table.add_column(heading, ratio=2 if heading == "asked" else 1)
    for base, adapter in pairs:
        cells = [base["prompt"], base["expected"], base["answer"], adapter["answer"]]
        texts = [Text(_short(cell)) for cell in cells]
        for text, told in ((texts[2], base), (texts[3], adapter)):
            text.stylize("green" if told["answer"] == told["expected"] else "red")
        table.add_row(*texts)
    return table


def _cell(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _exact(side: Mapping[str, Any]) -> str:
    return f"{side['exact_match']:.1%}" if "exact_match" in side else "-"


def _short(text: str, limit: int = 200) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[: limit - 4] + " ..."

"""The bars of `train.py`: how many times inlay's tokens a second are TRL's, and its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios of `cells` into a PNG, a group of bars each; lines are the rounds' spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = list(dict.fromkeys(side for cell in cells for side in cell["over"]))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 1.5 + 0.45 * len(cells)), sharey=True, width_ratios=(3, 2)
    )
    height = 0.8 / max(1, len(sides))
    for i, side in enumerate(sides):
        at = [(n + i * height, cell) for n, cell in enumerate(cells) if side in cell["over"]]
        places = [place for place, _ in at]
        faster = [cell["over"][side]["faster"] for _, cell in at]
        middle = [found[0] for found in faster]
        spread = [[m - low for m, low, _ in faster], [high - m for m, _, high in faster]]
        left.barh(places, middle, height, xerr=spread, label=f"over {side}")
        right.barh(places, [cell["over"][side]["leaner"] for _, cell in at], height)
    left.set_yticks(range(len(cells)), [name(cell) for cell in cells])
    left.invert_yaxis()
    left.set_xlabel("tokens/s of inlay over the other's: median, least and most of the rounds")
    right.set_xlabel("peak memory of the other over inlay's")
    for axis in (left, right):
        axis.axvline(1, color="black", linewidth=0.8)
    left.legend()
    figure.suptitle(", ".join(dict.fromkeys(cell["machine"] for cell in cells)))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def name(cell: dict[str, Any]) -> str:
    """Return what tells a combination from the others."""
    kept = ", checkpointing" if cell["checkpointing"] else ""
    method = "" if cell["method"] == "lora" else f" {cell['method']}"
    return f"{cell['shape']}{method} {cell['dtype']}{kept}"

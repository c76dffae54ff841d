"""The loss.png of a run folder: training and evaluation loss, drawn from events.jsonl alone."""

from __future__ import annotations

import io
from pathlib import Path

from inlay.checkpoint.atomic import write_bytes
from inlay.train.events import read_events


def plot_loss(folder: str | Path) -> Path | None:
    """Draw folder/loss.png and return its path; None where there is nothing to draw."""
    # the object interface, not pyplot: no window, no state of the caller's figures touched
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = read_events(Path(folder) / "events.jsonl")
    curves = {"training": "step", "evaluation": "eval"}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for label, kind in curves.items():
        points = [
            (e["step"], e["loss"]) for e in events if e["event"] == kind and e["loss"] is not None
        ]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(
                steps,
                losses,
                label=label,
                marker="o" if kind == "eval" or len(points) == 1 else None,
            )
            drawn = True
    if not drawn:
        return None
    axes.set(xlabel="optimizer step", ylabel="loss a trained token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    path = Path(folder) / "loss.png"
    write_bytes(path, image.getvalue())
    return path

"""training_loss.png: the loss as logged, and smoothed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex.files import atomic


def smooth(values: Sequence[float], weight: float = 0.6) -> list[float]:
    """Exponential moving average, started at the first value."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else weight * smoothed[-1] + (1 - weight) * value)
    return smoothed


def plot_loss(log_history: Sequence[dict[str, Any]], selection_steps: Sequence[int], path: Path) -> None:
    """Draw the training loss over steps, the loss on validation rows where it was taken, and a line at each selection;
    atomic."""
    from matplotlib.figure import Figure

    points = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    if not points:
        return
    steps, losses = zip(*points, strict=True)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9dc3e6", label="as logged", marker="o" if len(steps) < 40 else None, markersize=3)
    axes.plot(steps, smooth(losses), color="#1f5c99", label="smoothed")
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), color="#548235", marker="s", markersize=4, label="validation rows")
    for index, step in enumerate(selection_steps):
        axes.axvline(step, color="#c55a11", linewidth=0.8, linestyle="--", label="selection" if index == 0 else None)
    axes.set(xlabel="optimizer step", ylabel="loss", title=f"{path.parent.name}: loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=150)

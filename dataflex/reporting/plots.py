"""The pictures of a report as SVG text. Colours are CSS variables of the page: pictures are light or dark with it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.errors import UsageError
from dataflex.files import atomic
from dataflex.reporting.scores import OTHERS
from dataflex.training.plots import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A colour that stands for a CSS variable: matplotlib draws with it, and the SVG names the variable in its place.
INK, FAINT, MARK = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0102{number:02x}" for number in range(0x10, 0x19))
VARIABLES = {INK: "--ink", FAINT: "--faint", MARK: "--mark"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}
WIDTH, HEIGHT = 5.2, 3.0  # inches; at the width of a phone the text keeps its size
MOST_TICKS = 24
WIDEST = 44  # characters of all labels below a picture, beyond which they stand aslant


def _figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _as_svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element that fits into a page."""
    import matplotlib

    for axes in figure.axes:
        legend = axes.get_legend()
        if legend is not None:
            for text in legend.get_texts():
                text.set_color(INK)
    handle = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(handle, format="svg", transparent=True, metadata={"Date": None})
    svg = handle.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]*_\d+"', "", svg)  # ids that nothing refers to, the same in every picture
    svg = re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg height="[^"]*" ([^>]*?)width="[^"]*"', r"<svg \1", svg
    )
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _plain(text: str) -> str:
    """`text` as matplotlib writes it out: a pair of dollar signs would make it mathematics."""
    return text.replace("$", r"\$")


def loss_curve(facts: Mapping[str, Any]) -> str:
    """The training loss over the steps, each selection marked, and the loss on the validation rows."""
    figure, axes = _figure()
    steps, losses = [point["step"] for point in facts["loss"]], [point["loss"] for point in facts["loss"]]
    axes.plot(steps, losses, color=FAINT, linewidth=1, label="training, as logged")
    axes.plot(steps, smooth(losses), color=SERIES[0], label="training, smoothed")
    of_eval = facts["eval_loss"]
    points = [(0, of_eval["before"]), *((p["step"], p["loss"]) for p in facts["eval_losses"])]
    points.append((facts["steps"], of_eval["after"]))
    axes.plot(
        *zip(*dict(points).items(), strict=True), color=SERIES[1], marker="o", markersize=4, label="validation rows"
    )
    for number, made in enumerate(facts["selections"]):
        label = "selection" if number == 0 else None
        axes.axvline(made["step"], color=MARK, linewidth=1, linestyle="--", label=label)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.legend(frameon=False, fontsize=8)
    return _as_svg(figure, "loss over the steps")


def score_histogram(made: Mapping[str, Any]) -> str:
    """How many rows of each dataset have which score."""
    figure, axes = _figure()
    _draw_histogram(axes, made, SERIES)
    return _as_svg(figure, "histogram of the scores by dataset")


def save_score_histogram(made: Mapping[str, Any], path: str | Path) -> None:
    """Write `score_histogram` as a picture by itself, whole or not at all; the name of `path` ends with its format.

    Raises:
        UsageError: no such format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"plot {path}: no format of that name; end it with .png, .svg or .pdf")
    _draw_histogram(figure.subplots(), made, [f"C{number}" for number in range(len(SERIES))])
    with atomic(path, "wb") as handle:
        figure.savefig(handle, format=kind)


def _draw_histogram(axes: Axes, made: Mapping[str, Any], colours: Sequence[str]) -> None:
    edges = np.array(made["histogram"]["edges"])
    for colour, (name, counts) in zip(colours, made["histogram"]["datasets"].items(), strict=False):
        axes.stairs(counts, edges, color=colour, fill=False, linewidth=1.4, label=_plain(name))
    axes.set(xlabel="score", ylabel="rows")
    axes.legend(frameon=False, fontsize=8)


def picked_shares(picked: Sequence[Mapping[str, int]], labels: Sequence[str], what: str) -> str:
    """Stacked bars: the share of each dataset in the rows that were picked."""
    figure, axes = _figure()
    names = list(dict.fromkeys(name for one in picked for name in one))
    if len(names) > len(SERIES):
        rest = names[len(SERIES) - 1 :]
        picked = [{**one, OTHERS: sum(one.get(name, 0) for name in rest)} for one in picked]
        names = [*names[: len(SERIES) - 1], OTHERS]
    counts = np.array([[one.get(name, 0) for one in picked] for name in names], dtype=float)
    counts /= np.maximum(1, counts.sum(axis=0))
    bottom = np.zeros(len(picked))
    for number, (name, shares) in enumerate(zip(names, counts, strict=True)):
        axes.bar(range(len(picked)), shares, bottom=bottom, color=SERIES[number], label=_plain(name), width=0.8)
        bottom += shares
    every = max(1, -(-len(labels) // MOST_TICKS))
    axes.set_xticks(
        range(0, len(labels), every),
        [_plain(label) for label in labels[::every]],
        rotation=0 if sum(map(len, labels)) < WIDEST else 60,
    )
    axes.set(xlabel=what, ylabel="share of rows", ylim=(0, 1))
    figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower left", ncols=2, labelcolor=INK
    )
    return _as_svg(figure, "picked rows by dataset")


def overlap_of_selections(overlap: Sequence[Sequence[float]], steps: Sequence[int]) -> str:
    """The share of a selection's rows that the one before it, and the first one, had picked as well."""
    figure, axes = _figure(2.4)
    places = range(1, len(steps))
    axes.plot(
        [steps[i] for i in places],
        [overlap[i][i - 1] for i in places],
        color=SERIES[0],
        marker="o",
        label="the last one's",
    )
    axes.plot(
        [steps[i] for i in places],
        [overlap[i][0] for i in places],
        color=SERIES[1],
        marker="o",
        label="the first one's",
    )
    axes.set(xlabel="selection at step", ylabel="share of rows", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize=8)
    return _as_svg(figure, "overlap of the selections")


def seconds_by_phase(seconds: Mapping[str, float]) -> str:
    """Horizontal bars."""
    figure, axes = _figure(0.6 + 0.28 * len(seconds))
    names = list(seconds)
    axes.barh(range(len(names)), [seconds[name] for name in names], color=SERIES[0], height=0.6)
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    return _as_svg(figure, "seconds by phase")


def differences(summary: Sequence[Mapping[str, Any]]) -> str:
    """Each arm's loss against that of random rows at one budget, with its interval; left of 0 is better."""
    shown = [one for one in summary if "difference" in one]
    figure, axes = _figure(0.8 + 0.34 * len(shown))
    for place, one in enumerate(shown):
        better, worse = one["high"] < 0, one["low"] > 0
        colour = SERIES[2] if better else MARK if worse else INK
        axes.plot([one["low"], one["high"]], [place, place], color=colour, linewidth=2)
        axes.plot([one["difference"]], [place], color=colour, marker="o", markersize=6)
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.set_yticks(range(len(shown)), [_plain(one["arm"]) for one in shown])
    axes.invert_yaxis()
    axes.set(xlabel="held-out loss against random rows (left is better)")
    return _as_svg(figure, "held-out loss of each arm against random rows")


def budget_curve(summary: Sequence[Mapping[str, Any]]) -> str:
    """The held-out loss of each arm over the budget."""
    figure, axes = _figure()
    arms = list(dict.fromkeys(one["arm"] for one in summary))
    for number, arm in enumerate(arms):
        own = sorted((one["budget"], one["loss"]) for one in summary if one["arm"] == arm)
        style = ":" if arm in ("untouched", "all") else "-"
        colour = INK if arm == "random" else SERIES[number % len(SERIES)]
        axes.plot(*zip(*own, strict=True), color=colour, linestyle=style, marker="o", markersize=4, label=_plain(arm))
    axes.set(xlabel="budget, share of the rows", ylabel="held-out loss", xscale="log")
    axes.legend(frameon=False, fontsize=8)
    return _as_svg(figure, "held-out loss over the budget")


def decile_curve(deciles: Mapping[str, Mapping[str, Any]]) -> str:
    """The held-out loss after training on each tenth of each ranking."""
    figure, axes = _figure()
    for number, (name, test) in enumerate(deciles.items()):
        colour = INK if name == "random" else SERIES[number % len(SERIES)]
        axes.plot(range(1, 11), test["loss"], color=colour, marker="o", markersize=4, label=_plain(name))
    axes.set(xlabel="tenth of the ranking, best first", ylabel="held-out loss")
    axes.legend(frameon=False, fontsize=8)
    return _as_svg(figure, "held-out loss by tenth of the ranking")

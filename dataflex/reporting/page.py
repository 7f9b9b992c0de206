"""From the numbers of report.json to the page: what is shown, in which order, in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflex.reporting import plots

TEMPLATE = "page.html"
FIRST_WORDS = 70  # characters of a row that its closed line shows


@dataclass
class Picture:
    caption: str
    svg: Any


@dataclass
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Section:
    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    folded: bool = False
    """The tables show when they are asked for."""


def page_of(facts: Mapping[str, Any]) -> str:
    """The whole page as HTML. Every text of the facts is escaped: a row with markup is shown, never run."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    parts = {"dynamic": _of_run, "compare": _of_comparison, "score": _of_scores}[facts["command"]](facts)
    return environment.get_template(TEMPLATE).render(parts)


# --- what a page is made of ------------------------------------------------------------------------


def _of_run(facts: Mapping[str, Any]) -> dict[str, Any]:
    made, of_eval, others = facts["selections"], facts["eval_loss"], facts["others"]
    numbers = [
        (f"loss on {of_eval['rows']} validation rows", _change(of_eval)),
        ("optimizer steps", f"{facts['steps']} × {facts['rows_per_step']} rows"),
        ("selections", str(len(made))),
        ("rows in the pool", f"{facts['pool']['rows']:,}"),
    ]
    if others:
        numbers.insert(1, (f"loss on {others['rows']} other rows", _change(others)))
    sections = [
        Section("Training", pictures=[_picture("The loss, and when rows were selected", plots.loss_curve(facts))])
    ]
    if others:
        sections[0].text = (
            f"Forgetting: the loss on {others['rows']} random rows of the pool that were never trained on went from "
            f"{others['before']:.4f} to {others['after']:.4f}."
        )
    if made:
        sections += _sections_of_selections(facts)
    sections += [_seconds(facts), _settings(facts)]
    return {
        "title": f"{facts['selector']}: {facts['name']}",
        "subtitle": f"a run of dataflex dynamic on {facts['device']}, {facts['processes']} process(es)",
        "verdict": facts.get("verdict"),
        "numbers": numbers,
        "sections": sections,
    }


def _sections_of_selections(facts: Mapping[str, Any]) -> list[Section]:
    made = facts["selections"]
    last = made[-1]
    steps = [one["step"] for one in made]
    picked = [facts["pool"]["datasets"], *(one["picked"] for one in made)]
    pictures = [
        _picture(
            "What was picked, by dataset", plots.picked_shares(picked, ["pool", *map(str, steps)], "selection at step")
        ),
        _picture(f"Scores at step {last['step']}", plots.score_histogram(last)),
    ]
    if len(made) > 2:
        caption = "How many rows of a selection earlier ones had picked"
        pictures.append(_picture(caption, plots.overlap_of_selections(facts["overlap"], steps)))
    rows = [
        [
            f"step {one['step']}",
            one["rows"],
            f"{facts['overlap'][place][place - 1]:.0%}" if place else "",
            *(f"{one['quantiles'][key]:.4g}" for key in ("0.0", "0.5", "1.0")),
            f"{one['picked_tokens']:.0f}",
            f"{one['pool_tokens']:.0f}",
            _signed(one["length_correlation"]),
        ]
        for place, one in enumerate(made)
    ]
    columns = [
        "selection",
        "rows",
        "in the last one",
        "lowest score",
        "median",
        "best",
        "tokens a picked row",
        "tokens a row",
        "score ~ length",
    ]
    audit = Section(
        "Length",
        "Tokens are supervised ones. The last column is Spearman's correlation of score and length: near 1, the "
        "selector picks long rows.",
        tables=[Table(columns, rows)],
    )
    return [Section("Selections", pictures=pictures), audit, *_rows(facts, f"at step {last['step']}")]


def _of_comparison(facts: Mapping[str, Any]) -> dict[str, Any]:
    sections = []
    budgets = facts["budgets"]
    if len(budgets) > 1:
        picture = _picture("Held-out loss over the budget", plots.budget_curve(facts["summary"]))
        sections.append(Section("Budgets", pictures=[picture]))
    for budget in budgets:
        own = [one for one in facts["summary"] if one["budget"] == budget]
        runs = [one for one in facts["runs"] if one["budget"] == budget]
        section = Section(f"Budget {budget:g}", pictures=[_picture("Against random rows", plots.differences(own))])
        section.tables.append(
            Table(
                ["arm", "loss", "against random", "95% interval", "rows", "supervised tokens", "training seconds"],
                [_arm(one, [run for run in facts["runs"] if _is_of(run, one)]) for one in own],
            )
        )
        arms = [name for name in facts["arms"] if any(run["arm"] == name for run in runs)]
        picked = [_summed([run["picked"] for run in runs if run["arm"] == name]) for name in arms]
        shares = plots.picked_shares([facts["pool"]["datasets"], *picked], ["pool", *arms], "arm")
        section.pictures.append(_picture("What was picked, by dataset", shares))
        section.tables.append(_agreement([one for one in facts["agreement"] if one["budget"] == budget]))
        sections.append(section)
    if "deciles" in facts:
        rows = [
            [name, _signed(test["spearman"]), ", ".join(map(_signed, test["by_seed"]))]
            for name, test in facts["deciles"].items()
        ]
        sections.append(
            Section(
                "Tenths of the rankings",
                "Training on each tenth alone. Where a ranking helps, the loss rises from the first tenth to the last.",
                [_picture("Held-out loss by tenth", plots.decile_curve(facts["deciles"]))],
                [Table(["ranking", "Spearman of place and loss", "by seed"], rows)],
            )
        )
    if "lds" in facts:
        rows = [[name, ", ".join(map(_signed, values))] for name, values in facts["lds"].items()]
        text = (
            "Spearman's correlation, over random halves of the pool, of the summed scores with the loss that training "
            "on the half leaves, its sign turned."
        )
        sections.append(Section("Linear datamodeling score", text, tables=[Table(["scores", "by seed"], rows)]))
    sections += [_seconds(facts), _settings(facts)]
    held_out = facts["held_out"]
    how = f"budget by {facts['by']}, seeds {', '.join(map(str, facts['seeds']))}"
    return {
        "title": f"comparison of {', '.join(facts['arms'])}",
        "subtitle": f"{facts['name']}, on {facts['device']}; {how}",
        "verdict": facts["verdict"],
        "numbers": [
            (f"loss on {held_out['rows']} held-out rows, untouched", f"{facts['untouched']['loss']:.4f}"),
            ("rows in the pool", f"{facts['pool']['rows']:,}"),
            ("trainings", str(len(facts["runs"]))),
        ],
        "sections": sections,
    }


def _of_scores(facts: Mapping[str, Any]) -> dict[str, Any]:
    [made] = facts["selections"]
    quantiles = [[name, f"{value:.4g}"] for name, value in made["quantiles"].items()]
    section = Section("Scores", pictures=[_picture("Scores by dataset", plots.score_histogram(made))])
    section.tables.append(Table(["share of rows below", "score"], quantiles))
    return {
        "title": f"scores: {facts['name']}",
        "subtitle": f"{made['scored']:,} rows scored by {facts['selector']}",
        "verdict": None,
        "numbers": [
            ("rows", f"{made['scored']:,}"),
            ("Spearman of score and supervised tokens", _signed(made["length_correlation"])),
        ],
        "sections": [section, *_rows(facts, ""), _settings(facts)],
    }


def _rows(facts: Mapping[str, Any], when: str) -> list[Section]:
    return [
        Section(f"{name} rows {when}".strip(), rows=[{**row, "first": _first_words(row)} for row in facts[key]])
        for name, key in (("Best", "best"), ("Worst", "worst"))
        if facts.get(key)
    ]


def _first_words(row: Mapping[str, Any]) -> str:
    turns = [turn["text"] for turn in row.get("turns", ()) if turn["role"] != "system"]
    words = " ".join(turns[0].split()) if turns else ""
    return words if len(words) <= FIRST_WORDS else f"{words[:FIRST_WORDS]}…"


def _seconds(facts: Mapping[str, Any]) -> Section:
    rounded = {name: value for name, value in facts["seconds"].items() if value >= 0.05}
    pictures = [_picture("Seconds by phase", plots.seconds_by_phase(rounded))] if rounded else []
    return Section("Time", pictures=pictures)


def _settings(facts: Mapping[str, Any]) -> Section:
    flat = {key: value for key, value in facts["settings"].items() if value is not None}
    tables = [
        Table([], [[key, str(value)] for key, value in flat.items()]),
        Table([], [[name, str(value)] for name, value in facts["fingerprints"].items() if value]),
        Table([], [[name, str(value)] for name, value in facts.get("versions", {}).items()]),
    ]
    return Section("Settings and fingerprints", tables=[table for table in tables if table.rows], folded=True)


def _arm(one: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    against = (
        [f"{one['difference']:+.4f}", f"{one['low']:+.4f} to {one['high']:+.4f}"] if "difference" in one else ["", ""]
    )
    means = [
        f"{sum(run[key] for run in runs) / len(runs):,.0f}" if runs else "" for key in ("rows", "tokens", "seconds")
    ]
    return [one["arm"], f"{one['loss']:.4f}", *against, *means]


def _is_of(run: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    return run["arm"] == one["arm"] and (run["budget"] == one["budget"] or one["arm"] == "all")


def _agreement(pairs: Sequence[Mapping[str, Any]]) -> Table:
    """The share of rows that two arms both picked, every arm against every other."""
    shares = {(one["a"], one["b"]): f"{one['share']:.0%}" for one in pairs}
    arms = list(dict.fromkeys(name for pair in shares for name in pair))
    cells = [[name, *(shares.get((name, other)) or shares.get((other, name), "") for other in arms)] for name in arms]
    return Table(["rows that both picked", *arms], cells)


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total


def _picture(caption: str, svg: str) -> Picture:
    from markupsafe import Markup

    return Picture(caption, Markup(svg))


def _change(loss: Mapping[str, float]) -> str:
    return f"{loss['before']:.4f} → {loss['after']:.4f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"

"""`--dry-run`, printed."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.text import Text

from dataflex.commands.console import Console, visible
from dataflex.commands.session import Session


def show_plan(session: Session, command: str, *, launches: bool = False, nproc: int | None = None) -> None:
    """Find out what `command` would do and print it as tables, or as JSON.

    Args:
        launches: whether the command may start several processes: `nproc`, or as many as the environment and the
            configuration ask for.
    """
    from dataflex.launch import planned_processes
    from dataflex.planning import plan

    console = session.console
    with planned_processes(session.config, nproc) if launches else contextlib.nullcontext():
        found = plan(session.config, command, console)
    for reason in found.unknown:
        console.warning(f"not known: {reason}")
    if found.sizes:
        console.facts("cost, about", {_named(key): _size(key, value) for key, value in found.sizes.items()})
    if found.schedule:
        console.facts("schedule", {key.replace("_", " "): _text(value) for key, value in found.schedule.items()})
    if found.data:
        show_data(console, found.data)
    set_keys = sorted(session.config.model_fields_set)
    console.facts(f"{command}: what is set", {key: getattr(session.config, key) for key in set_keys})
    console.say(f"dry run: {command} is ready; nothing was written")
    console.result([_in_words(command, found.schedule)], {"command": command, "dry_run": True, **asdict(found)})


def show_data(console: Console, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Print each split's numbers, the reasons of its dropped rows, and its first row, what is learned in colour."""
    columns = {name: _numbers(data) for name, data in splits.items()}
    names = next(iter(columns.values()))
    rows = [[name, *[column[name] for column in columns.values()]] for name in names]
    console.table("data", ["", *columns], rows)
    reasons = [
        [name, count, data["first_dropped"][reason], reason]
        for name, data in splits.items()
        for reason, count in data["dropped"].items()
    ]
    if reasons:
        console.table("rows that cannot be used", ["split", "rows", "first row", "reason"], reasons)
    for name, data in splits.items():
        _show_example(console, name, data["example"])


def _numbers(data: Mapping[str, Any]) -> dict[str, int]:
    keys = ("rows", "kept", "truncated", "lost_end", "tokens", "supervised_tokens")
    return {
        **{key.replace("_", " "): data[key] for key in keys},
        **{f"length {name}": length for name, length in data["lengths"].items()},
        "dropped": sum(data["dropped"].values()),
    }


def _show_example(console: Console, name: str, example: Mapping[str, Any]) -> None:
    """The text of a row. Without colours, brackets tell what is learned."""
    coloured = console.err.is_terminal and console.err.color_system is not None and not console.err.no_color
    legend = "green is learned" if coloured else "⟦…⟧ is learned"
    console.err.print(f"{name}: row {example['row']} of {example['dataset']}; {legend}", style="bold", markup=False)
    text = Text()
    for span in example["spans"]:
        shown = visible(span["text"])
        shown = shown if coloured or not span["supervised"] else f"⟦{shown}⟧"
        text.append(shown, style="green" if span["supervised"] else "dim")
    console.err.print(text, soft_wrap=True)


def _in_words(command: str, schedule: dict[str, Any]) -> str:
    """The schedule as one line."""
    parts = [command]
    if "steps" in schedule:
        parts.append(f"{schedule['steps']} steps of {schedule['rows_per_step']} rows")
    if "rounds" in schedule:
        rounds = f"{schedule['rounds']:g} round{'' if schedule['rounds'] == 1 else 's'}"
        parts[-1] += f" in {rounds} of {schedule['steps_per_round']}"
    if "selections" in schedule:
        made = f"{len(schedule['selections'])} selections of {schedule['rows_per_selection']} rows"
        parts.append(f"{made} at steps {_text(schedule['selections'])}")
    return ": ".join([parts[0], ", ".join(parts[1:])]) if parts[1:] else f"{command}: ready to run"


def _text(value: object) -> str:
    if isinstance(value, list):
        shown = ", ".join(str(item) for item in value[:12])
        return f"{shown}, … ({len(value)} in all)" if len(value) > 12 else shown or "none"
    if isinstance(value, dict):
        return "; ".join(f"{count} {reason}" for reason, count in value.items()) or "0"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _named(key: str) -> str:
    return key.removesuffix("_bytes").replace("_seconds", "_time").replace("_", " ")


def _size(key: str, value: int) -> str:
    if key.endswith("flops"):
        return f"{value / 1e12:.3g} TFLOP"
    if key.endswith("seconds"):
        return f"{datetime.timedelta(seconds=value)} h"
    if not key.endswith("bytes"):
        return f"{value:,}"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value} bytes"

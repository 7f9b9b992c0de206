"""`--dry-run`, printed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dataflex.commands.session import Session


def show_plan(session: Session, command: str) -> None:
    """Find out what `command` would do and print it as tables, or as JSON."""
    from dataflex.planning import plan

    console = session.console
    found = plan(session.config, command, console)
    set_keys = sorted(session.config.model_fields_set)
    console.table(f"{command}: configuration", ["key", "value"], [[key, getattr(session.config, key)] for key in set_keys])
    if found.schedule:
        rows = [[key.replace("_", " "), _text(value)] for key, value in found.schedule.items()]
        console.table("schedule", ["", "value"], rows)
    if found.data:
        columns = ["split", "rows", "kept", "dropped", "truncated", "lost end", "tokens", "longest"]
        console.table(
            "data",
            columns,
            [
                [name, d["rows"], d["kept"], _text(d["dropped"]), d["truncated"], d["lost_end"], d["tokens"], d["longest"]]
                for name, d in found.data.items()
            ],
        )
    if found.sizes:
        console.table("sizes", ["", "value"], [[k.replace("_", " "), _size(k, v)] for k, v in found.sizes.items()])
    for reason in found.unknown:
        console.warning(f"not known: {reason}")
    console.say("dry run: nothing was written")
    console.result([_in_words(command, found.schedule)], {"command": command, "dry_run": True, **asdict(found)})


def _in_words(command: str, schedule: dict[str, Any]) -> str:
    """The schedule as one line."""
    parts = [command]
    if "steps" in schedule:
        parts.append(f"{schedule['steps']} steps of {schedule['rows_per_step']} rows")
    if "selections" in schedule:
        parts.append(f"selections of {schedule['rows_per_selection']} rows at {_text(schedule['selections'])}")
    return ": ".join([parts[0], ", ".join(parts[1:])]) if parts[1:] else f"{command}: nothing to schedule"


def _text(value: object) -> str:
    if isinstance(value, list):
        shown = ", ".join(str(item) for item in value[:12])
        return f"{shown}, … ({len(value)} in all)" if len(value) > 12 else shown or "none"
    if isinstance(value, dict):
        return "; ".join(f"{count} {reason}" for reason, count in value.items()) or "0"
    return str(value)


def _size(key: str, value: int) -> str:
    if not key.endswith("bytes"):
        return f"{value:,}"
    return f"about {value / 1e9:.2f} GB" if value >= 1e8 else f"about {value / 1e6:.1f} MB"

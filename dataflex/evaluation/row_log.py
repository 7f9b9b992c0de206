"""What an evaluation has found so far, a line of JSON a row: a killed command goes on from it.

The first line says what the rows came from. A line is written once its numbers are known; a last line that was cut off
is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dataflex.errors import UsageError
from dataflex.files import write_text
from dataflex.origin import Origin


def log_path(output: Path) -> Path:
    """Where the log of the evaluation that writes `output` is."""
    return output.with_name(output.name + ".partial")


def take_up(path: Path, origin: Origin, token_budget: int, overwrite: bool) -> tuple[int, dict[int, dict[str, Any]]]:
    """The token budget of the log in `path` and its values by index of the row; a new log where there is none.

    Raises:
        UsageError: where the log is one of other work.
    """
    lines = [] if overwrite or not path.exists() else path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if not whole:
        write_text(path, json.dumps({"origin": origin.as_json(), "token_budget": token_budget}) + "\n")
        return token_budget, {}
    try:
        head = json.loads(whole[0])
        differences = Origin.from_json(head["origin"]).differences(origin)
        values: dict[int, dict[str, Any]] = {}
        for entry in map(json.loads, whole[1:]):
            values.setdefault(int(entry.pop("index")), {}).update(entry)
        budget = int(head["token_budget"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is no log of an evaluation; give --overwrite, or another output") from None
    if differences:
        raise UsageError(
            f"{path} is the log of another evaluation: {'; '.join(differences)}; give --overwrite, or another output"
        )
    write_text(path, "".join(whole))
    return budget, values


def append(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Add a line for each entry."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(entry) + "\n" for entry in entries)

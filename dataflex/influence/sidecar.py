"""What a score file or a subset came from, in `FILE.manifest.json` beside it: their own lines have no room for it.

The manifest names its file by hash, so it says nothing of a file that was edited or put in its place. It is removed
before its file is written and written after it; a file without one is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dataflex.errors import UsageError
from dataflex.files import sha256_of, write_json
from dataflex.progress import Progress

SUFFIX = ".manifest.json"


def manifest_path(path: Path) -> Path:
    """Where the manifest of `path` is."""
    return path.with_name(path.name + SUFFIX)


def write_with_manifest(path: Path, write: Callable[[], None], rows: int, came_from: Mapping[str, Any]) -> None:
    """Write a file by `write`, and its manifest."""
    manifest_path(path).unlink(missing_ok=True)
    write()
    facts = {"sha256": sha256_of(path), "rows": rows, "first_line": _first_line(path)}
    write_json(manifest_path(path), {**facts, **came_from})


def facts_of(path: Path) -> dict[str, Any]:
    """The manifest of a file that was just written."""
    facts: dict[str, Any] = json.loads(manifest_path(path).read_text(encoding="utf-8"))
    return facts


def read_manifest(path: Path, rows: int, progress: Progress) -> dict[str, Any] | None:
    """What `path`, which has `rows` rows, came from; None where that is not known.

    Raises:
        UsageError: if the manifest cannot be read, or the file looks cut off: it begins the same and has fewer rows.
    """
    beside = manifest_path(path)
    try:
        manifest = json.loads(beside.read_text(encoding="utf-8"))
        digest, written, first_line = manifest["sha256"], int(manifest["rows"]), manifest["first_line"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{beside}: not readable ({error}); delete it to use {path.name} as it is") from None
    if digest == sha256_of(path):
        return manifest
    if rows < written and first_line == _first_line(path):
        raise UsageError(
            f"{path}: {rows} of {written} rows are left; make it again, or delete {beside} if that is meant"
        )
    progress.say(f"{path} has been changed since {beside.name} was written, which is not looked at")
    return None


def _first_line(path: Path) -> str:
    """sha256 (hex) of the first line."""
    with open(path, "rb") as handle:
        return hashlib.sha256(handle.readline()).hexdigest()

"""`dataflex init`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dataflex.commands import session as s

EXAMPLE = "Example: dataflex init first --model models/SmolLM2-135M-Instruct"

Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Where to write; made if it is not there.")]


def init(
    folder: Folder = ".",
    model: s.Model = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Write a project that runs as it is.

    It has a run.yaml with comments, components, and a few rows: a pool of facts and sums, sums as the target, and
    held-out sums. --overwrite replaces what is there.
    """
    with s.session(None, {}, as_json=as_json, quiet=quiet) as session:
        from dataflex.starting import MODEL
        from dataflex.starting import init as write

        written = write(folder, model or MODEL, overwrite=overwrite, dry_run=dry_run)
        session.next("dynamic", Path(folder) / "run.yaml", "--dry-run")
        if dry_run:
            return session.console.result([str(path) for path in written], {"command": "init", "dry_run": True})
        session.console.result(written, {"command": "init"})

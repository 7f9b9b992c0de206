"""`dataflex report`"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dataflex.commands import session as s

EXAMPLE = "Example: dataflex report saves/demo"

Target = Annotated[
    str,
    typer.Argument(metavar="WHAT", help="A folder that dynamic or compare wrote, or a score file.", show_default=False),
]
Against = Annotated[
    str | None,
    typer.Option("--against", help="The folder of another run of dynamic, to be compared with.", show_default=False),
]


def report(
    target: Target,
    arguments: s.Arguments = None,
    against: Against = None,
    data: Annotated[str | None, s.option("data", "--data")] = None,
    dataset_dir: s.DatasetDir = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Write a page of what a run, a comparison or a scoring found.

    dynamic and compare write their own at their end. A page is one file without scripts: it can be sent to others.
    An earlier page of the same name is replaced.
    """
    options = {"data": data, "dataset_dir": dataset_dir}
    with s.session(arguments, options, as_json=as_json, quiet=quiet) as session:
        import dataflex
        from dataflex.reporting.run import facts_of

        if dry_run:
            facts = facts_of(session.config, target, against, session.console)
            session.console.say("dry run: nothing was written")
            return session.console.result(
                [f"report of {facts['command']}: ready"], {"command": "report", "dry_run": True}
            )
        page = dataflex.report(session.config, target, against, session.console)
        found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
        if found.get("verdict"):
            session.console.say(found["verdict"])
        written = [page, page.with_suffix(".json")]
        session.console.result(written, {"command": "report"})

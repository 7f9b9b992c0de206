"""`dataflex inspect`"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dataflex.commands import session as s
from dataflex.commands.planned import show_data
from dataflex.commands.summaries import show_best_and_worst, show_run, show_scores, show_subset

if TYPE_CHECKING:
    from dataflex.inspection import Inspection

TABLED = ("score_max", "score_mean", "score_min", "datasets", "winners")
"""Facts of scores that their table shows."""
TABLED_OF_RUN = (
    *("rows", "pool", "selections", "selections_at", "steps", "rows_per_step", "current_steps", "total_steps"),
    *("eval_rows", "eval_loss", "others", "seconds"),
)
"""Facts of a finished run that its tables show."""
FINGERPRINT = re.compile("[0-9a-f]{64}")
EXAMPLE = "Example: dataflex inspect alpaca_en_demo examples/demo.yaml"

Target = Annotated[
    str,
    typer.Argument(
        metavar="WHAT",
        help="A store, scores, a subset, a dataset (a name or a file), a checkpoint, a run or a comparison.",
        show_default=False,
    ),
]


def inspect(
    target: Target,
    arguments: s.Arguments = None,
    model: s.Model = None,
    dataset_dir: s.DatasetDir = None,
    template: s.Template = None,
    cutoff_len: s.CutoffLen = None,
    data: Annotated[str | None, s.option("data", "--data")] = None,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw the histogram of scores: .png, .svg or .pdf.")
    ] = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Say what a file, folder or dataset is, and whether it is whole.

    With a model, from CONFIG or --model, a dataset is shown as the model will see it: how long its rows are, what
    is truncated or dropped and why, and one row with the tokens that are learned in colour. Of scores the best and the
    worst rows are shown as text where CONFIG or --data names the datasets that they score, of a subset its first and
    its last rows. Of a finished run what was picked.
    """
    options = {
        "model_name_or_path": model,
        "dataset_dir": dataset_dir,
        "template": template,
        "cutoff_len": cutoff_len,
        "data": data,
        "overwrite": overwrite,
    }
    with s.session(arguments, options, as_json=as_json, quiet=quiet) as session:
        from dataflex.data.catalog import find_sources
        from dataflex.errors import UsageError
        from dataflex.files import check_output_file, read_jsonl
        from dataflex.inspection import inspect as look

        console = session.console
        found = look(target, session.config, console, keep=not dry_run)
        console.facts(f"{found.kind} {found.name}", _told(found))
        if found.kind == "scores":
            from dataflex.influence.score_file import read_scores
            from dataflex.influence.sidecar import read_manifest

            scores = read_scores(target)
            names = session.config.data or session.config.dataset
            sources = find_sources(names, session.config.dataset_dir) if names else []
            manifest = read_manifest(Path(target), len(scores.row), console) or {}
            show_scores(console, "scores", scores)
            show_best_and_worst(console, scores, lambda: sources, manifest.get("files"))
            if plot is not None and not dry_run:
                from dataflex.reporting.plots import save_score_histogram
                from dataflex.reporting.scores import figures_of_scores

                check_output_file(plot, overwrite)
                save_score_histogram(figures_of_scores(scores, None), plot)
        elif plot is not None:
            raise UsageError(f"--plot draws scores, and {target} is a {found.kind}; name a score file or a selection")
        if found.kind == "subset":
            path = Path(found.name)
            show_subset(console, path, read_jsonl(path, "subset"), ("the first rows", "the last rows"))
        if _is_finished_run(found):
            show_run(console, Path(found.name), found.facts)
        if found.data is not None and found.example is not None:
            show_data(console, {found.kind: {**found.data, "example": found.example}})
        for problem in found.problems:
            console.warning(problem)
        state = "whole" if found.whole else "not whole"
        said: list[str | Path] = [f"{found.name}: {found.kind}, {state}"]
        if plot is not None and not dry_run:
            said.append(Path(plot))
        console.result(said, {"command": "inspect", **found.as_dict()})


def _is_finished_run(found: Inspection) -> bool:
    tabled = found.facts.keys() >= set(TABLED_OF_RUN) - {"selections_at", "current_steps", "total_steps", "others"}
    return found.facts.get("command") == "dynamic" and found.facts.get("finished") is True and tabled


def _told(found: Inspection) -> dict[str, Any]:
    """The facts that the terminal shows: without those that the tables of scores or of a finished run have, and of a
    store without the keys at their defaults, unless they name its direction or projection. Fingerprints are cut to
    what a glance compares."""
    from dataflex.config import RunConfig, default_of
    from dataflex.store.reader import SHOWN

    told = {}
    for key, value in found.facts.items():
        if (found.kind == "scores" and key in TABLED) or (_is_finished_run(found) and key in TABLED_OF_RUN):
            continue
        is_default = key in RunConfig.model_fields and value == default_of(key)
        if found.kind == "store" and is_default and key not in SHOWN:
            continue
        cut = isinstance(value, str) and FINGERPRINT.fullmatch(value)
        told[key.replace("_", " ")] = f"{value[:12]}…" if cut else value
    return told

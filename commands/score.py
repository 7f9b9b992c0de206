"""`dataflex score`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dataflex.commands import session as s
from dataflex.commands.planned import show_plan
from dataflex.commands.summaries import show_best_and_worst, show_scores
from dataflex.config import help_of
from dataflex.progress import Interrupted

if TYPE_CHECKING:
    from dataflex.influence.scores import Scores

WORDS = {
    "length_correlation": "Spearman's correlation with supervised tokens",
    "projection_correlation": "correlation with scores of whole gradients, estimated",
}
"""How the terminal names what is known of the scores."""
EXAMPLE = "Example: dataflex score --train saves/train.h5 --eval saves/eval.h5 -o saves/scores.jsonl"


def score(
    arguments: s.Arguments = None,
    train: Annotated[list[str] | None, s.option("train_stores", "--train")] = None,
    validation: Annotated[list[str] | None, s.option("eval_stores", "--eval")] = None,
    weights: Annotated[str | None, s.option("weights", "--weights")] = None,
    reduce: s.Reduce = None,
    component: Annotated[str | None, s.option("component_name", "--selector")] = None,
    exact: Annotated[bool, typer.Option("--exact", help=help_of("exact"))] = False,
    checkpoint: s.Checkpoints = None,
    output: s.Output = None,
    skip_bad_rows: s.SkipBadRows = False,
    nproc: s.Nproc = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Score rows by their cosine with the validation rows.

    Give --train and --eval once per checkpoint, in the same order. Or give a CONFIG and --selector, which needs no
    store; with --checkpoint, once per checkpoint, where the selector takes gradients. --exact is --selector less.
    """
    options = s.given(locals())
    with s.session(
        arguments, options, as_json=as_json, quiet=quiet, command="score", alone=dry_run, nproc=nproc
    ) as session:
        if dry_run:
            return show_plan(session, "score", launches=True, nproc=nproc)
        import dataflex
        from dataflex.influence.score_file import read_scores
        from dataflex.influence.sidecar import facts_of

        path = dataflex.score(session.config, session.console)
        scores = read_scores(path)
        made = facts_of(path)
        show_scores(session.console, f"scores of {len(scores.row)} rows", scores)
        names = session.config.dataset
        if not session.console.quiet:
            _show_rows(session, scores, names or [], made.get("files"))
        correlations = {key: made[key] for key in WORDS if key in made}
        session.console.facts("scores", {WORDS[key]: value for key, value in correlations.items()})
        if names:
            subset = path.with_name("subset.jsonl")
            config = [s.CONFIG] if session.path is not None else []
            session.next("select", *config, "--scores", path, "--data", ",".join(names), "--top", "5%", "-o", subset)
        facts = {"command": "score", "output": str(path), "rows": len(scores.row)} | correlations
        session.console.result([path], facts)


def _show_rows(session: s.Session, scores: Scores, names: list[str], files: str | None) -> None:
    """Rows as text where their data is there. The scores are written, and whatever goes wrong here does not undo it."""
    from dataflex.data.catalog import find_sources

    try:
        show_best_and_worst(session.console, scores, lambda: find_sources(names, session.config.dataset_dir), files)
    except Interrupted:
        session.console.warning("interrupted after the scores were written; no row is shown as text")

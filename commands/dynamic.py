"""`dataflex dynamic`"""

from __future__ import annotations

import json

from dataflex.commands import session as s
from dataflex.commands.planned import show_plan
from dataflex.commands.summaries import show_run

EXAMPLE = "Example: dataflex dynamic examples/demo.yaml --dry-run"


def dynamic(
    arguments: s.Arguments = None,
    model: s.Model = None,
    dataset: s.Dataset = None,
    eval_dataset: s.EvalDataset = None,
    dataset_dir: s.DatasetDir = None,
    template: s.Template = None,
    cutoff_len: s.CutoffLen = None,
    gradient_type: s.GradientType = None,
    adam_formula: s.AdamFormula = None,
    proj_dim: s.ProjDim = None,
    projector: s.Projector = None,
    token_budget: s.TokenBudget = None,
    output_dir: s.OutputDir = None,
    skip_bad_rows: s.SkipBadRows = False,
    nproc: s.Nproc = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Fine-tune on random rows first, then on selected ones.

    Every update_step optimizer steps the rows that help the validation data most are picked anew; each
    selection is kept in output_dir/selections.
    """
    options = s.given(locals())
    with s.session(
        arguments, options, as_json=as_json, quiet=quiet, command="dynamic", alone=dry_run, nproc=nproc
    ) as session:
        if dry_run:
            return show_plan(session, "dynamic", launches=True, nproc=nproc)
        import dataflex

        folder = dataflex.dynamic(session.config, session.console)
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        show_run(session.console, folder, run)
        session.next("eval", s.CONFIG, "--adapter", folder, "-o", folder / "eval.json")
        facts = {key: value for key, value in run.items() if key != "losses_of_others"}  # a value a row
        session.console.result([folder], {"command": "dynamic", "output_dir": str(folder), **facts})

"""`dataflex bench`"""

from __future__ import annotations

from dataflex.commands import session as s
from dataflex.commands.planned import show_plan

EXAMPLE = "Example: dataflex bench examples/demo.yaml bf16=true"


def bench(
    arguments: s.Arguments = None,
    model: s.Model = None,
    dataset: s.Dataset = None,
    dataset_dir: s.DatasetDir = None,
    template: s.Template = None,
    cutoff_len: s.CutoffLen = None,
    gradient_type: s.GradientType = None,
    proj_dim: s.ProjDim = None,
    projector: s.Projector = None,
    token_budget: s.TokenBudget = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Measure gradients against LoRA training on this machine."""
    options = s.given(locals())
    with s.session(arguments, options, as_json=as_json, quiet=quiet, command="bench") as session:
        if dry_run:
            return show_plan(session, "bench")
        import dataflex

        found = dataflex.bench(session.config, session.console)
        parts, peaks, full = found["grads"]["seconds"], found["peak_memory_bytes"], found["dataset"]
        everything = sum(parts.values())
        done, limit = found["grads"]["flops_per_s"], found["matmul_flops_per_s"]
        session.console.facts(
            f"{found['device']}, {found['dtype']}, {found['sample']['rows']} rows, {found['sample']['tokens']} tokens",
            {
                "LoRA training": f"{found['train']['tokens_per_s']:.1f} tokens/s, peak {peaks['train'] / 1e9:.2f} GB",
                "gradients": f"{found['grads']['tokens_per_s']:.1f} tokens/s, peak {peaks['grads'] / 1e9:.2f} GB",
                "ratio": f"{found['ratio']:.2f}",
                "the gradients' arithmetic": f"{done / 1e9:.0f} GFLOP/s without attention, "
                f"{100 * done / limit:.0f}% of what a large matrix product reaches",
                "of the gradients' time": ", ".join(f"{name} {100 * v / everything:.1f}%" for name, v in parts.items()),
                "for the whole dataset": f"{full['rows']} rows in about {full['seconds']:.0f} s",
            },
        )
        session.console.result(
            [f"gradients {found['ratio']:.2f} times as fast as LoRA training"], {"command": "bench", **found}
        )

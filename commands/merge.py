"""`dataflex merge`"""

from __future__ import annotations

from typing import Annotated

from dataflex.commands import session as s
from dataflex.commands.planned import show_plan

EXAMPLE = "Example: dataflex merge examples/merge.yaml"


def merge(
    arguments: s.Arguments = None,
    model: s.Model = None,
    adapter: Annotated[str | None, s.option("adapter_name_or_path", "--adapter")] = None,
    export_dir: Annotated[str | None, s.option("export_dir", "--export-dir", "-o")] = None,
    template: s.Template = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """Fold LoRA adapters into their base model and save a whole model.

    Plain transformers, vLLM and Ollama load it. Several adapters, by comma, are merged one after the other.
    """
    options = s.given(locals())
    with s.session(arguments, options, as_json=as_json, quiet=quiet, command="merge") as session:
        if dry_run:
            return show_plan(session, "merge")
        import dataflex

        folder = dataflex.merge(session.config, session.console)
        size = sum(path.stat().st_size for path in folder.iterdir())
        session.console.result([folder], {"command": "merge", "export_dir": str(folder), "bytes": size})

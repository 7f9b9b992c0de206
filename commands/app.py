"""`dataflex`: the Typer application.

`dataflex --help` stays quick: a command's module is imported when that command is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

# Each command and the first sentence of its function's docstring, under the panel of the group's help that lists it.
# commands/NAME.py holds the function NAME.
PANELS = {
    "Begin": {
        "init": "Write a project that runs as it is.",
        "keys": "List every key, with its default, help and users.",
        "env": "Print versions, devices and memory, for a report of a fault.",
    },
    "A whole run": {
        "dynamic": "Fine-tune on random rows first, then on selected ones.",
        "compare": "Say whose rows help held-out rows: selectors' or random ones.",
    },
    "Single steps": {
        "warmup": "Train a LoRA adapter on random rows for warmup_step steps.",
        "grads": "Collect every row's projected gradient in an HDF5 store.",
        "score": "Score rows by their cosine with the validation rows.",
        "select": "Write the best-scored rows of a dataset as JSONL, best first.",
        "train": "Train a LoRA adapter on all of a dataset, such as a subset.",
        "merge": "Fold LoRA adapters into their base model and save a whole model.",
    },
    "Look and measure": {
        "inspect": "Say what a file, folder or dataset is, and whether it is whole.",
        "eval": "Measure a model on held-out rows: loss, perplexity, answers.",
        "report": "Write a page of what a run, a comparison or a scoring found.",
        "bench": "Measure gradients against LoRA training on this machine.",
    },
}
COMMANDS = {name: sentence for commands in PANELS.values() for name, sentence in commands.items()}


class _Commands(TyperGroup):
    """The group of COMMANDS. The group's own help needs only their sentences; a call imports the one command."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, sentence in COMMANDS.items():
            self.add_command(TyperCommand(name, help=sentence), name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print usage, sentences, commands by panel and options, as the help of a command looks."""
        from dataflex.commands.help_lines import help_console, print_lines

        console = help_console()
        console.print(f"Usage: dataflex {' '.join(self.collect_usage_pieces(ctx))}\n", markup=False)
        console.print(self.help or "", markup=False)
        console.print()
        for panel, commands in PANELS.items():
            print_lines(console, panel, commands.items())
        options: list[Any] = self.get_params(ctx)
        print_lines(console, "Options", [(", ".join(option.opts), option.help or "") for option in options])
        console.print("\nA command's own help: dataflex COMMAND --help", markup=False)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in COMMANDS:
            self.add_command(_imported(args[0]), args[0])
        return super().resolve_command(ctx, args)


def _imported(name: str) -> Any:
    """The command as Typer builds it from the parameters of its function."""
    from dataflex.commands.help import HELP, Command

    module = import_module(f"dataflex.commands.{name}")
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(name, cls=Command, epilog=module.EXAMPLE, context_settings={"help_option_names": HELP})(
        getattr(module, name)
    )
    return typer.main.get_command(alone)


app = typer.Typer(
    name="dataflex",
    cls=_Commands,
    help=(
        "Pick the training rows that help a target task, and fine-tune on them (LESS, ICML 2024).\n\n"
        "dataflex dynamic does all of it in one run. The other commands are its steps, and exchange files: "
        "warmup → grads (training rows, validation rows) → score → select → train → merge."
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from dataflex.distribution import own_version

        typer.echo(f"dataflex {own_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before the command."""


def main() -> None:
    app()

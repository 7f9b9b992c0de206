"""`dataflex`: the Typer application. `dataflex --help` must stay quick, so nothing here imports torch."""

from __future__ import annotations

import typer

from dataflex.commands import bench, dynamic, grads, inspect, merge, score, select, train, warmup

app = typer.Typer(
    name="dataflex",
    help=(
        "Pick the training rows that help a target task, and fine-tune on them (LESS, ICML 2024).\n\n"
        "[bold]dataflex dynamic[/] does all of it in one run. The other commands are its steps, and exchange files: "
        "warmup → grads (training rows, validation rows) → score → select → train → merge."
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog=dynamic.EXAMPLE)(dynamic.dynamic)
app.command(epilog=warmup.EXAMPLE)(warmup.warmup)
app.command(epilog=grads.EXAMPLE)(grads.grads)
app.command(epilog=score.EXAMPLE)(score.score)
app.command(epilog=select.EXAMPLE)(select.select)
app.command(epilog=train.EXAMPLE)(train.train)
app.command(epilog=merge.EXAMPLE)(merge.merge)
app.command(epilog=inspect.EXAMPLE)(inspect.inspect)
app.command(epilog=bench.EXAMPLE)(bench.bench)


def main() -> None:
    app()

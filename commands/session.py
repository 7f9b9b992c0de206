"""What every command shares: its arguments and options, its errors and exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import dataflex
from dataflex import environment
from dataflex.commands import completion
from dataflex.commands.console import Console
from dataflex.commands.signals import stoppable
from dataflex.config import RunConfig, help_of, needed_keys
from dataflex.distribution import namesake_notice
from dataflex.errors import DataflexError
from dataflex.progress import Interrupted

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [key=value ...]",
        autocompletion=completion.keys,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and show what would be done; touch nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and errors only.")]
AllowOverlap = Annotated[bool, typer.Option("--allow-overlap", help=help_of("allow_overlap"))]
Overwrite = Annotated[bool, typer.Option("--overwrite", help=help_of("overwrite"))]


def option(key: str, *flags: str) -> Any:
    """An option that sets `key`, whose help, choices and default commands/help.py shows."""
    return typer.Option(*flags, help=help_of(key), autocompletion=completion.values(key))


Model = Annotated[str | None, option("model_name_or_path", "--model")]
Dataset = Annotated[str | None, option("dataset", "--dataset")]
EvalDataset = Annotated[str | None, option("eval_dataset", "--eval-dataset")]
DatasetDir = Annotated[str | None, option("dataset_dir", "--dataset-dir")]
Template = Annotated[str | None, option("template", "--template")]
CutoffLen = Annotated[int | None, option("cutoff_len", "--cutoff-len")]
OutputDir = Annotated[str | None, option("output_dir", "--output-dir", "-o")]
Output = Annotated[str | None, option("output", "--output", "-o")]
Checkpoints = Annotated[list[str] | None, option("checkpoint", "--checkpoint")]
GradientType = Annotated[str | None, option("gradient_type", "--gradient-type")]
AdamFormula = Annotated[str | None, option("adam_formula", "--adam-formula")]
ProjDim = Annotated[str | None, option("proj_dim", "--proj-dim")]
Projector = Annotated[str | None, option("projector", "--projector")]
Nproc = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Processes to share the work, one a GPU.", show_default=False)
]
TokenBudget = Annotated[int | None, option("token_budget", "--token-budget")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help=help_of("skip_bad_rows"))]
Reduce = Annotated[str | None, option("reduce", "--reduce")]


# Parameters of commands that have another name than the key they set.
KEYS = {
    "model": "model_name_or_path",
    "adapter": "adapter_name_or_path",
    "train": "train_stores",
    "validation": "eval_stores",
    "component": "component_name",
}


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """A command's parameters, its `locals()`, as values by key; those that set no key are left out."""
    named = {KEYS.get(name, name): value for name, value in parameters.items()}
    return {key: value for key, value in named.items() if key in RunConfig.model_fields}


CONFIG = object()
"""Stands for the YAML that was given, in the words of a command that comes next."""


@dataclass(frozen=True)
class Session:
    """A command under way."""

    config: RunConfig
    console: Console
    path: Path | None
    """The YAML that was given."""
    dataset_dir: str | None = None
    """The dataset_dir that was given beside it."""

    def next(self, *words: Any) -> None:
        """Name the command that comes next, ready to be pasted. CONFIG among its words stands for the YAML; a command
        that was told everything without a YAML has no next one that is as short."""
        if CONFIG in words and self.path is None:
            return
        if CONFIG in words and self.dataset_dir is not None:
            words = (*words, f"dataset_dir={self.dataset_dir}")
        self.console.next(shlex.join(["dataflex", *(str(self.path if word is CONFIG else word) for word in words)]))


@contextlib.contextmanager
def session(
    arguments: list[str] | None,
    options: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
    command: str | None = None,
    alone: bool = True,
    nproc: int | None = None,
) -> Iterator[Session]:
    """Load the configuration, run the block, and turn whatever goes wrong into one message and an exit code.

    What `command` needs is checked first, before torch is imported and before other processes are started. Unless it
    is to run `alone`, the whole command may be started again in several processes, of which the first prints: `nproc`,
    or as many as the environment and the configuration ask for.
    """
    from dataflex.config_file import load_config
    from dataflex.launch import end_with_launcher
    from dataflex.needs import check_needs

    end_with_launcher()
    if not alone:
        os.environ.update(environment.slurm_variables(nproc, os.environ))
    first = environment.rank() == 0
    console = Console(as_json=as_json, quiet=quiet, first=first)
    debug = os.environ.get("DATAFLEX_DEBUG") == "1"
    try:
        _quieten_libraries(debug)
        path, overrides = _split_arguments(arguments or [])
        # by identity: 0 is a value that was given, and equal to False
        given = {key: value for key, value in options.items() if not (value is None or value is False or value == [])}
        with stoppable(console), _warnings_to(console, debug), contextlib.redirect_stdout(sys.stderr):
            config = load_config(path, overrides, given)
            if config.trust_remote_code and config.model_name_or_path:
                console.warning(f"trust_remote_code: the code that {config.model_name_or_path} brings is run")
            if command is not None:
                check_needs(config, command)
            loads = command is not None and "model_name_or_path" in needed_keys(command)
            if console.err.is_terminal and loads and not environment.launched():  # by then the launcher has said it
                console.say(f"loading torch and transformers, then {config.model_name_or_path}")
            if not alone:
                _start_processes(config, nproc, console)
            if notice := namesake_notice():  # after a launcher's part of the command, so that it is said once
                console.warning(notice)
            beside = "dataset_dir" in given or any(text.startswith("dataset_dir=") for text in overrides)
            with console.alive():
                yield Session(config, console, path, config.dataset_dir if beside else None)
            if "torch.distributed" in sys.modules:
                from dataflex import processes

                processes.leave()
    except DataflexError as error:
        if debug:
            raise
        if first or error.exit_code != 2:  # every process finds the same fault in what it was given
            console.error(str(error))
        raise typer.Exit(error.exit_code) from None
    except Interrupted as stop:
        if first:
            console.error(_farewell(stop))
        raise typer.Exit(stop.exit_code) from None
    except KeyboardInterrupt:  # before or after the block
        console.error("interrupted")
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(1) from None
    except Exception as error:
        if console.stop_code and environment.launched():  # what fails now fails because the other processes have ended
            raise typer.Exit(console.stop_code) from None
        if debug:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        console.error(f"{type(error).__name__}: {reason} (DATAFLEX_DEBUG=1 shows where)")
        raise typer.Exit(1) from None


def _start_processes(config: RunConfig, nproc: int | None, console: Console) -> None:
    """Start this command again in several processes and end with their exit code, where that is wanted."""
    from dataflex.launch import launch, launch_arguments, visible_gpus

    options = launch_arguments(config, nproc, os.environ)
    if options is not None:
        raise typer.Exit(launch(options, sys.argv[1:]))
    if nproc is None and not environment.launched() and visible_gpus() > 1:
        console.warning(f"{visible_gpus()} GPUs are there and one is used; --nproc {visible_gpus()} takes all of them")


def _farewell(stop: Interrupted) -> str:
    """What an interrupted command leaves, and the command to go on with."""
    word = "interrupted" if stop.exit_code == 130 else "terminated"
    kept = getattr(stop, "__notes__", [])
    arguments = sys.argv[1:]
    if kept:  # to start afresh now would drop it
        afresh = ("overwrite=", "overwrite_output_dir=")
        arguments = [text for text in arguments if text != "--overwrite" and not text.startswith(afresh)]
    what = "; ".join(kept) or "nothing new was committed, what was committed before stays"
    return f"{word}: {what}. To go on: {shlex.join(['dataflex', *arguments])}"


def _split_arguments(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The configuration file, which has no `=` or exists as it stands, and the key=value texts."""
    from dataflex.errors import UsageError

    files = [text for text in arguments if "=" not in text or Path(text).is_file()]
    if len(files) > 1:
        raise UsageError(f"more than one configuration file: {', '.join(files)}; the others need the form key=value")
    return (Path(files[0]) if files else None), [text for text in arguments if text not in files]


def _quieten_libraries(debug: bool) -> None:
    """The libraries' chatter stays away unless debugging; before they are imported."""
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of our libraries; ours are not tqdm's
    # DeepSpeed sets its logger's level when it is imported, so a filter is what lasts
    logging.getLogger("DeepSpeed").addFilter(_errors_only)


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def _warnings_to(console: Console, debug: bool) -> Iterator[None]:
    """Our own warnings go through the console, each once; the libraries' stay away unless debugging."""

    said: set[str] = set()
    ours = (Path(dataflex.__file__).parent, Path(__file__).parent)  # two places where the install is editable

    def show(message: Any, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        is_ours = category is UserWarning and any(Path(filename).is_relative_to(folder) for folder in ours)
        if is_ours and str(message) not in said:
            said.add(str(message))
            console.warning(str(message))

    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = show
        yield

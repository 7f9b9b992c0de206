"""Ours beside three peers: the same rows, model, adapter and moments, float32 on the CPU, one after the other.

    python examples/benchmarks/peers.py examples/demo.yaml --rows 16

run from the repository with the Python that dataflex is installed in. The first time it makes an environment for each
peer under `--env-root`: that needs pip, some minutes, and 4 GB of disk where pip finds a torch without CUDA. The rest
takes most of an hour, nearly all of it in dense projections: `--slow-rows` bounds DataFlex's, `--only` names programs.
Set OMP_NUM_THREADS for another number of threads than torch chooses.

Why it is as it is:

- Every program runs in a process of its own, alone on the machine, and times itself: imports, loading the model,
  setting up and a warm-up row are left out; what it does once for every batch or buffer is not.
- The peers get the torch, transformers and peft that ours has. Left to their own requirements they would bring other
  versions of torch, and the table would compare those. So they are installed with --no-deps beside what they import.
- They compute different things, and the table says which. Where their vectors can be had before the projection,
  the notes have the cosine with ours.
- A program that fails has its error in the table, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported; the runners inherit it

import run_ours
from safetensors.torch import save_file
from shared import Inputs, Row, read_inputs, spread, write_inputs

import dataflex
from dataflex.errors import DataflexError
from dataflex.model import load_tokenizer
from dataflex.projection.identity import Identity
from dataflex.provenance import device_name

HERE = Path(__file__).parent
MODELS = ("torch", "numpy", "transformers", "peft", "accelerate", "datasets", "safetensors")
# What each peer imports, at our versions where we have it; then the peer itself, without its requirements.
ENVIRONMENTS = {
    "dataflex": (MODELS, ("dataflex==1.1.0", "traker==0.3.2")),
    "bergson": (
        (*MODELS, "jaxtyping", "ml_dtypes", "natsort", "scipy", "petname", "simple-parsing", "torchopt", "jinja2"),
        ("bergson==2.5.1",),
    ),
    "trak": (("torch", "numpy", "safetensors", "tqdm"), ("traker==0.3.2",)),
}
MOST_VECTORS = 8
# Tokens in a batch where the configuration leaves them to ours: both programs that make batches get the same.
BERGSONS_BUDGET = 2048


@dataclass(frozen=True)
class Program:
    """One line of the table."""

    name: str
    environment: str | None
    """None: the one this script runs in."""
    command: tuple[str, ...]
    """A runner and its arguments, without the folder of the inputs."""
    computes: str
    baseline: str
    """The program of ours that it is compared with."""


@dataclass(frozen=True)
class Result:
    program: Program
    figures: dict[str, Any]
    """What the runner reported; empty if it failed."""
    error: str = ""


def programs(slow_rows: int) -> list[Program]:
    ours, theirs, plain = "run_ours.py", "run_dataflex.py", "run_bergson.py"
    sketch, dense = ("--projector", "sketch", "--dim", "8192"), ("--projector", "rademacher", "--dim", "4096")
    gradients = [
        Program("ours", None, (ours, *sketch), "Adam direction, sketch to 8192", "ours"),
        Program(
            "dataflex",
            "dataflex",
            (theirs, "--rows", str(slow_rows)),
            "Adam direction, dense Rademacher to 4096 (TRAK's, float16)",
            "ours",
        ),
        Program("bergson", "bergson", (plain,), "gradient, every LoRA matrix to 16 × 16", "ours"),
        Program("bergson-adam", "bergson", (plain, "--adam"), "gradient / √v, every LoRA matrix to 16 × 16", "ours"),
    ]
    projections = []
    for batch in ("1", "8"):
        size = ("--batch", batch)
        base = f"sketch-{batch}"
        projections += [
            Program(base, None, (ours, *sketch, *size), f"ours, sketch to 8192, batch {batch}", base),
            Program(f"dense-{batch}", None, (ours, *dense, *size), f"ours, dense to 4096, batch {batch}", base),
            Program(f"trak-{batch}", "trak", ("run_trak.py", *size), f"dense to 4096, batch {batch}", base),
        ]
    return gradients + projections


def pinned(names: Sequence[str]) -> list[str]:
    """At our versions where we have the package; without a suffix like +cpu, which other indexes lack."""
    return [f"{name}=={version(name).partition('+')[0]}" if name in MODELS else name for name in names]


def environment(root: Path, name: str) -> Path:
    """The Python of a peer's environment, which is made if it is not there or was made from other requirements."""
    imported, peer = ENVIRONMENTS[name]
    folder = (root / f"env-{name}").absolute()
    python, made_from = folder / "bin" / "python", folder / "requirements.json"
    wanted = json.dumps([pinned(imported), peer])
    if made_from.is_file() and made_from.read_text() == wanted:
        return python
    print(f"making {folder}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *pinned(imported)], check=True)
    subprocess.run([*install, "--no-deps", *peer], check=True)
    made_from.write_text(wanted)
    return python


def prepare(config_file: str, folder: Path, count: int) -> None:
    """Write the inputs that all programs share; the warm-up is skipped where it is complete."""
    config = dataflex.load_config(config_file, [f"output_dir={folder / 'warmup'}"])
    checkpoint = dataflex.warmup(config)
    examples = dataflex.load_examples(config, "train")
    chosen = [examples[index] for index in spread([len(example.input_ids) for example in examples], count)]
    rows: list[Row] = [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in chosen]
    pad = load_tokenizer(config).pad_token_id
    budget = config.token_budget or BERGSONS_BUDGET
    write_inputs(folder, Inputs(config.model_name_or_path, str(checkpoint), budget, pad), rows)
    write_vectors(folder)


def write_vectors(folder: Path) -> None:
    """What the peers' vectors are compared with, and what the projectors are given."""
    inputs, rows = read_inputs(folder)
    capture = run_ours.capture_of(inputs)
    whole = Identity(capture.parameters)
    direction = run_ours.direction_of(capture, inputs, formula="dataflex")
    gradient = run_ours.direction_of(capture, inputs, gradient_type="sgd")
    vectors = {
        "direction": run_ours.project(capture, rows[:MOST_VECTORS], direction, whole),
        "gradient": run_ours.project(capture, rows[:1], gradient, whole)[0],
    }
    save_file(vectors, folder / "vectors.safetensors")


def measure(program: Program, folder: Path, root: Path) -> Result:
    """Run a program; its output goes to a log in `folder`."""
    try:
        python = environment(root, program.environment) if program.environment else Path(sys.executable)
    except subprocess.CalledProcessError as error:
        return Result(program, {}, f"no environment: {shlex.join(error.cmd)} exited with {error.returncode}")
    runner, *arguments = program.command
    done = subprocess.run(
        [str(python), str(HERE / runner), str(folder), *arguments], capture_output=True, text=True, check=False
    )
    (folder / f"{program.name}.log").write_text(done.stderr + done.stdout, encoding="utf-8")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Result(program, json.loads(lines[-1]))
    said = done.stderr.strip().splitlines() or [""]
    return Result(program, {}, f"exit code {done.returncode}: {said[-1]}")


def speed(figures: dict[str, Any]) -> float:
    """Tokens a second, which evens out that programs may run on different rows; rows a second where there are none."""
    return (figures["tokens"] or figures["rows"]) / figures["seconds"]


def table_line(result: Result, baselines: dict[str, dict[str, Any]]) -> str:
    name, figures = result.program.name, result.figures
    if result.error:
        return f"| {name} | failed: {result.error.replace('|', '/')} | | | | |"
    per_row = figures["seconds"] / figures["rows"]
    tokens = f"{speed(figures):.1f}" if figures["tokens"] else "–"
    ours = baselines.get(result.program.baseline)
    ratio = f"{speed(ours) / speed(figures):.3g}" if ours else "–"
    return f"| {name} | {result.program.computes} | {figures['rows']} | {per_row:.4g} | {tokens} | {ratio} |"


def note_line(result: Result) -> str:
    figures = result.figures
    parts = ", ".join(f"{name} {seconds:.4g} s" for name, seconds in figures["seconds_by_part"].items())
    built = f"{figures['program']} {figures['version']}, torch {figures['torch']}, {figures['threads']} threads"
    return f"- {result.program.name} ({built}): {parts}. {figures['note']}"


def markdown(results: Sequence[Result]) -> str:
    """The whole report."""
    good = [result for result in results if not result.error]
    baselines = {result.program.name: result.figures for result in good}
    lines = [
        f"# Ours beside its peers, {date.today()}",
        "",
        f"`{shlex.join(['python', *sys.argv])}` on {device_name()}; float32, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}.",
        "",
        "| program | what it computes | rows | seconds a row | tokens/s | ours ÷ theirs in speed |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *[table_line(result, baselines) for result in results],
        "",
        "The lines with a batch are projections alone, of ready-made directions as wide as the adapter.",
        "",
        *[note_line(result) for result in good],
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    names = [program.name for program in programs(0)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file: its model, adapter, training data, token_budget")
    parser.add_argument("--rows", type=int, default=16, help="rows, spread evenly over the lengths in the data")
    parser.add_argument("--slow-rows", type=int, default=4, help="how many of them DataFlex runs on")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--work", type=Path, default=Path("saves/benchmarks/peers"), help="for inputs and logs")
    parser.add_argument("--env-root", type=Path, default=Path("saves/benchmarks"), help="for the peers' environments")
    parser.add_argument("--output", type=Path, default=Path("saves/benchmarks/peers.md"))
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        prepare(args.config, args.work, args.rows)
    except DataflexError as error:
        sys.exit(f"error: {error}")
    results = []
    for program in programs(args.slow_rows):
        if args.only is None or program.name in args.only:
            print(f"running {program.name}", file=sys.stderr)
            results.append(measure(program, args.work, args.env_root))
    text = markdown(results)
    args.output.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(any(result.error for result in results))


if __name__ == "__main__":
    main()

"""The `init` command: a project that runs as it is, to be changed into one's own."""

from __future__ import annotations

from pathlib import Path

from dataflex.errors import UsageError
from dataflex.files import write_text

STARTER = Path(__file__).parent / "starter"
FILES = (
    "run.yaml",
    "components.yaml",
    "data/dataset_info.json",
    "data/pool.jsonl",
    "data/target.jsonl",
    "data/held_out.jsonl",
)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def init(folder: str | Path, model: str = MODEL, overwrite: bool = False, dry_run: bool = False) -> list[Path]:
    """Write a commented run.yaml, components and a few rows into `folder`; return the files' paths.

    Args:
        model: what the run.yaml names as base model.
        overwrite: replace files that are there.
        dry_run: write nothing.

    Raises:
        UsageError: where one of the files is there already; nothing is written then.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"init {folder}: a file; name a folder")
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise UsageError(
            f"init {folder}: {', '.join(there)} is there already; name another folder, or give --overwrite"
        )
    for name in () if dry_run else FILES:
        text = (STARTER / name).read_text(encoding="utf-8")
        if name == "run.yaml":
            text = text.replace("{model}", model).replace("{folder}/", "" if folder == Path() else f"{folder}/")
        write_text(folder / name, text)
    return [folder / name for name in FILES]

"""The checkpoint folders of a run: when one is sealed, what it holds, and which are kept.

A checkpoint is sealed in two steps, once every process has written its part: checkpoint.json says what the folder
holds and how it was trained, then moments.safetensors says that the folder is finished. A folder without moments was
cut off by a kill. Removal goes the other way: the seal first.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from dataflex.errors import UsageError
from dataflex.files import write_json
from dataflex.training.method import TrainingMethod
from dataflex.training.moments import FILE_NAME as MOMENTS
from dataflex.training.moments import AdamMoments, save_moments

FILE_NAME = "checkpoint.json"


@dataclass(frozen=True)
class Contents:
    """What checkpoint.json says."""

    method: TrainingMethod
    next_learning_rate: float
    """Of the step after the checkpoint."""
    resumable: bool
    """Whether optimizer, scheduler and random state are there; False under save_only_model."""
    files: dict[str, int]
    """Bytes of each file in the folder by relative path, but for checkpoint.json and the moments."""


def step_of(checkpoint: Path | None) -> int:
    """The optimizer steps behind a checkpoint; 0 for none."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run by step, sealed or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def is_sealed(checkpoint: Path) -> bool:
    """Whether the folder was finished."""
    return (checkpoint / MOMENTS).is_file()


def newest_sealed(output_dir: Path) -> Path | None:
    """The last checkpoint that was finished."""
    return next(filter(is_sealed, reversed(checkpoints_in(output_dir))), None)


def seal(
    checkpoint: Path, moments: AdamMoments, method: TrainingMethod, next_learning_rate: float, resumable: bool
) -> None:
    """Finish a checkpoint that every process has written its part of."""
    files = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in (FILE_NAME, MOMENTS)
    }
    contents = Contents(method, next_learning_rate, resumable, files)
    write_json(checkpoint / FILE_NAME, asdict(contents))
    save_moments(moments, checkpoint)


def read_contents(checkpoint: Path) -> Contents:
    """What a sealed checkpoint's checkpoint.json says.

    Raises:
        UsageError: it is missing or broken.
    """
    path = checkpoint / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Contents(**{**values, "method": TrainingMethod(**values["method"])})
    except FileNotFoundError:
        raise UsageError(
            f"{checkpoint} has no {FILE_NAME}, which says how it was trained; {way_out(checkpoint)}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{checkpoint} is damaged ({FILE_NAME}: {error}); {way_out(checkpoint)}") from None


def check_whole(checkpoint: Path) -> None:
    """Raise a UsageError unless training can go on from a sealed checkpoint."""
    contents = read_contents(checkpoint)
    if not contents.resumable:
        raise UsageError(
            f"{checkpoint} was written under save_only_model: it has no optimizer state to go on from. "
            f"To train on from its adapter, name it as adapter_name_or_path with another output_dir; "
            f"otherwise {way_out(checkpoint)}"
        )
    for name, size in contents.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UsageError(f"{checkpoint} is damaged ({name} is missing); {way_out(checkpoint)}")
        if path.stat().st_size != size:
            raise UsageError(
                f"{checkpoint} is damaged ({name} has {path.stat().st_size} bytes, not {size}); {way_out(checkpoint)}"
            )


def way_out(checkpoint: Path) -> str:
    """What to do where a run cannot go on from its newest checkpoint."""
    earlier = [path for path in checkpoints_in(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    before = next((path for path in reversed(earlier) if is_sealed(path)), None)
    if before is None:
        return "give --overwrite to start afresh"
    return f"delete it, and the same command goes on from {before.name}"


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. The seal goes first, so that a kill leaves a folder that counts as cut off."""
    if (checkpoint / MOMENTS).is_file():
        (checkpoint / MOMENTS).unlink()
    shutil.rmtree(checkpoint)


def keep_newest(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints until `limit` are left. The newest and the one of the `best` evaluation stay."""
    if limit is None:
        return
    found = checkpoints_in(output_dir)
    kept = {path for path in found if path == found[-1] or (best is not None and path == Path(best))}
    removable = [path for path in found if path not in kept]
    for path in removable[: max(0, len(found) - max(limit, len(kept)))]:
        remove(path)

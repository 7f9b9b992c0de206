"""The gradients of a dataset at a checkpoint, written into a store: the `grads` command, and `dynamic`'s use of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import processes
from dataflex.config import MARKS, RunConfig, needed, values_of
from dataflex.data.examples import Split, dated, split_names
from dataflex.data.rows import dataset_columns, row_numbers, subtasks_of, supervised_tokens
from dataflex.distribution import own_version
from dataflex.errors import DataflexError, UsageError
from dataflex.files import check_room
from dataflex.fingerprints import base_model_fingerprint, live_adapter_fingerprint
from dataflex.gradients.capture import Capture, make_capture
from dataflex.gradients.direction import make_direction
from dataflex.gradients.passes import batches_of, name_bad_rows, project_rows
from dataflex.gradients.probe import TRYING, check_capture
from dataflex.gradients.reference import reference_weights
from dataflex.keys import Decides, select_keys
from dataflex.lora import lora_pairs
from dataflex.masking import masked
from dataflex.model import compute_dtype, device, load_adapter, load_frozen_model, on_device
from dataflex.needs import check_needs
from dataflex.outline import note_gradient_pass, note_peak, note_store, outline
from dataflex.planning import Plan, read_rows
from dataflex.progress import SILENT, Interrupted, Progress
from dataflex.projection.table import check_projector, make_projector, projector_class
from dataflex.store.manifest import Manifest, check_same_work
from dataflex.store.reader import GradientStore
from dataflex.store.writer import StoreWriter, create_store
from dataflex.training.moments import AdamMoments, load_moments, moments_fingerprint

LIBRARIES = ("torch", "transformers", "peft", "h5py")
# Keys that a store does not hold by their own name: what they stand for is in its manifest.
TOLD_OTHERWISE = ("eval_gradient_type", "eval_dataset", "dataset_dir")
MANIFEST_KEYS = select_keys(
    MARKS, lambda mark: "grads" in mark.users and (mark.compared or mark.decides is Decides.ROWS)
)
"""The keys that decide what a store holds."""


@dataclass(frozen=True)
class Collection:
    """A gradient pass that is ready to begin, and the store it will fill."""

    config: RunConfig
    capture: Capture
    split: Split
    moments: AdamMoments | None
    path: Path


def grads(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Collect the gradients of `split` at `checkpoint` into the store `output`, and return its path.

    A store that is there already is gone on with if it came from the same things; `overwrite` starts anew.
    """
    ready = prepare_grads(config, Plan("grads"), progress)
    return collect(ready.config, ready.capture, ready.split, config.split, ready.moments, ready.path, progress)


def prepare_grads(config: RunConfig, plan: Plan, progress: Progress = SILENT) -> Collection:
    """Find out and check everything that `grads` needs; nothing is written."""
    check_needs(config, "grads")
    path = Path(needed(config.output))
    if not plan.dry_run:
        processes.join(config.ddp_timeout)
    config = dated(config, None if config.overwrite else _kept_day(path))
    checkpoint = Path(needed(config.checkpoint)[0])
    moments = load_moments(checkpoint)
    tokenizer, splits = read_rows(config, [config.split], plan, progress)
    split = splits[config.split]
    sizes = outline(config, plan, [split], checkpoint, config.grad_layers)
    gradient_type = config.eval_gradient_type if config.split == "eval" else config.gradient_type
    make_direction(gradient_type, config.adam_formula, moments, sizes.slots)
    check_projector(config.projector, config.proj_dim or 0, device())
    wanted = note_store(config, plan, sizes, [split], [path])
    check_room(path, f"output {path}", wanted, "lower proj_dim, or choose a smaller store_dtype")
    note_peak(plan, sizes, note_gradient_pass(config, plan, sizes, [split]))
    plan.needs_weights(config, sizes.base)
    capture = checkpoint_capture(config, checkpoint, tokenizer.pad_token_id)
    progress.say(TRYING)
    check_capture(capture, split.examples, progress)
    if path.exists() and not config.overwrite:
        manifest = manifest_of(config, capture, split, config.split, moments, progress, keep=not plan.dry_run)
        check_store(path, manifest)
    return Collection(config, capture, split, moments, path)


def checkpoint_capture(config: RunConfig, checkpoint: Path, pad_token_id: int) -> Capture:
    """The base model with `checkpoint`'s adapter, ready for a pass."""
    dtype = compute_dtype(config)
    model = on_device(load_adapter(load_frozen_model(config), checkpoint, config))
    return make_capture(model, dtype, pad_token_id, config.token_budget, config.grad_layers)


def collect(
    config: RunConfig,
    capture: Capture,
    split: Split,
    split_name: str,
    moments: AdamMoments | None,
    path: Path,
    progress: Progress = SILENT,
    *,
    cache: bool = False,
    standing_for: np.ndarray | None = None,
) -> Path:
    """Write the projected directions of every row of `split` into the store `path`.

    Rows that a former run of the same command committed are kept; batches are cut from all rows, so the
    rest are computed in the same company, and on a processor come out with the same bits.

    Args:
        moments: of the optimizer at these parameters; needed for `adam` only.
        cache: replace a store that came from something else, rather than refuse.
        standing_for: how many rows of the pool each row stands for, where the rows are a sample of it.
    """
    manifest = manifest_of(config, capture, split, split_name, moments, progress)
    gradient_type = config.eval_gradient_type if split_name == "eval" else config.gradient_type
    direction = make_direction(gradient_type, config.adam_formula, moments, capture.slots, config.marginal)
    reference = reference_weights(config, len(split.examples), standing_for) if split_name == "train" else {}
    projector = make_projector(
        config.projector, capture.parameters, manifest.proj_dim, config.proj_seed, capture.device
    )
    if processes.rank() == 0:
        _prepare_store(path, manifest, split, config.overwrite, cache)
    processes.barrier()
    with GradientStore(path) as store:
        if config.token_budget is None:  # the memory that is free now may ask for another cut
            capture = replace(capture, token_budget=store.manifest.token_budget or capture.token_budget)
        done = store.done.astype(bool)
        bad = [split.examples[index] for index in np.flatnonzero(store.bad).tolist()]
    if bad and not config.skip_bad_rows:
        raise DataflexError(f"gradient store {path}: {name_bad_rows(bad)}; give --skip-bad-rows, or --overwrite")
    batches = [batch for batch in batches_of(capture, split.examples, manifest.proj_dim) if not done[batch].all()]
    computed = project_rows(
        capture,
        split.examples,
        batches,
        direction,
        projector,
        progress,
        f"{split_name} gradients",
        done=len(split.examples) - sum(map(len, batches)),
        skip_bad=config.skip_bad_rows,
        reference=reference,
    )
    # the other processes hand their rows to the first: one writer, whatever the file system
    with StoreWriter(path) if processes.rank() == 0 else contextlib.nullcontext() as writer:
        try:
            for rows in computed:
                mine = (rows.indices, rows.vectors.cpu().numpy(), rows.loss.cpu().numpy(), rows.plain.cpu().numpy())
                for indices, vectors, loss, plain in processes.gather(mine):
                    if indices:
                        weights = np.array([reference[index] for index in indices if index in reference])
                        writer.write(indices, vectors, loss, plain, weights)
                        bad += [split.examples[index] for index in np.array(indices)[~vectors.any(axis=1)]]
            if writer is not None:
                writer.flush()
        except Interrupted as stop:
            if writer is not None:
                with contextlib.suppress(Interrupted):
                    writer.flush()
                stop.add_note(f"{writer.done.sum()} of {len(writer.done)} rows are committed in {path}")
            raise
    if bad:
        progress.say(f"{split_name} rows {name_bad_rows(bad)}")
    processes.barrier()
    return path


def manifest_of(
    config: RunConfig,
    capture: Capture,
    split: Split,
    split_name: str,
    moments: AdamMoments | None,
    progress: Progress = SILENT,
    keep: bool = True,
) -> Manifest:
    """The manifest of a store of the directions of `split` at the parameters of `capture`. Collective under ZeRO-3.

    `keep` False adds no hash of a file to the cache.
    """
    gradient_type = config.eval_gradient_type if split_name == "eval" else config.gradient_type
    base_model, base_facts = base_model_fingerprint(config, progress, keep)
    projector = projector_class(config.projector)
    typed: dict[str, Any] = {
        "model_name_or_path": masked(config.model_name_or_path),
        "base_model": base_model,
        "adapter": live_adapter_fingerprint(lora_pairs(capture.model)),
        "dtype": str(capture.dtype).removeprefix("torch."),
        "split": split_name,
        "dataset": split_names(config, split_name),
        "datasets": dataset_starts(split),
        "data": split.fingerprint,
        "files": split.files,
        "facts": {"data": split.facts, "base_model": base_facts},
        "prompt_date": str(config.prompt_date) if config.prompt_date else None,
        "gradient_type": gradient_type,
        "adam_formula": config.adam_formula if gradient_type == "adam" else None,
        "moments": moments_fingerprint(moments) if gradient_type == "adam" and moments is not None else None,
        "projector_device": projector.manifest_device(),
        "proj_dim": projector.width(capture.parameters, config.proj_dim or 0),
        "store_dtype": config.store_dtype,
        "parameters": [[slot.name, slot.size] for slot in capture.slots],
        "token_budget": capture.token_budget,
        "step": moments.step if moments else 0,
        "learning_rate": moments.learning_rate if moments else config.learning_rate,
        "versions": {"dataflex": own_version(), **{name: version(name) for name in LIBRARIES}},
    }
    further = [key for key in MANIFEST_KEYS if key not in typed and key not in TOLD_OTHERWISE]
    settings = values_of(config, further)
    settings["marginal"] = config.marginal and gradient_type == "adam"
    if split_name == "eval":
        settings["contrast"] = 0
    return Manifest(**typed, settings=masked(settings))


def dataset_starts(split: Split) -> list[list[Any]]:
    """[name, first kept row] of each dataset, in row order: rows count through the datasets as named."""
    names, source = dataset_columns(split.examples)
    rows = row_numbers(split.examples)
    present, first = np.unique(source, return_index=True)  # rows ascend, so the first one is the lowest
    starts = [[names[index], int(rows[at])] for index, at in zip(present.tolist(), first.tolist(), strict=True)]
    return sorted(starts, key=lambda start: start[1])


def _kept_day(path: Path) -> str | None:
    """The day that the prompts of a store tell which is there already; None where there is none to go on with."""
    if not path.exists():
        return None
    try:
        with GradientStore(path) as store:
            return store.manifest.prompt_date
    except UsageError:
        return None  # told when the store is taken up


def _prepare_store(path: Path, manifest: Manifest, split: Split, overwrite: bool, cache: bool) -> None:
    """Make the store, or see that the one there is a part of this same work."""
    if path.exists() and not overwrite:
        try:
            check_store(path, manifest)
            return
        except UsageError:
            if not cache:
                raise
    create_store(
        path,
        manifest=manifest,
        row=row_numbers(split.examples),
        tokens=supervised_tokens(split.examples),
        subtask=subtask_names(split),
    )


def check_store(path: Path, manifest: Manifest) -> None:
    """Raise a UsageError unless the store in `path` is sound and a part of the work that `manifest` describes."""
    with GradientStore(path) as store:
        check_same_work(path, store.manifest, manifest)
        store.require_sound()


def subtask_names(split: Split) -> list[str] | None:
    """Each row's subtask, or None where no row has one."""
    names = subtasks_of(split.examples)
    return [name or "" for name in names] if any(names) else None

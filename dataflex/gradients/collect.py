"""The gradients of a dataset at a checkpoint, written into a store: the `grads` command, and `dynamic`'s use of it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import processes
from dataflex.config import RunConfig, require
from dataflex.data.examples import Split, load_split
from dataflex.errors import DataflexError, UsageError
from dataflex.files import check_output_file
from dataflex.gradients.capture import Capture, make_capture
from dataflex.gradients.direction import make_direction
from dataflex.gradients.manifest import check_same, describe
from dataflex.gradients.passes import batches_of, name_bad_rows, project_rows
from dataflex.gradients.projection import make_projector
from dataflex.gradients.store import GradientStore
from dataflex.gradients.store_writer import StoreWriter, create_store
from dataflex.model import check_vocabulary, compute_dtype, load_adapter, load_frozen_model, load_tokenizer, on_device
from dataflex.progress import SILENT, Interrupted, Progress
from dataflex.training.moments import AdamMoments, load_moments


def grads(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Collect the gradients of `split` at `checkpoint` into the store `output`, and return its path.

    A store that is there already is gone on with if it came from the same things; `overwrite` starts anew.
    """
    dataset_key = "eval_dataset" if config.split == "eval" else "dataset"
    require(config, "grads", "model_name_or_path", dataset_key, "checkpoint", "output")
    if len(config.checkpoint) != 1:
        raise UsageError(f"grads takes one checkpoint, not {len(config.checkpoint)}; write a store for each")
    if config.proj_dim is None and config.projector != "none":
        raise UsageError("proj_dim null means exact scores without a store; use `score --exact`, or projector=none")
    path = Path(config.output)
    check_output_file(path, overwrite=True)

    processes.join(config.ddp_timeout)
    checkpoint = Path(config.checkpoint[0])
    tokenizer = load_tokenizer(config)
    split = load_split(config, tokenizer, config.split, progress)
    capture = checkpoint_capture(config, checkpoint, tokenizer.pad_token_id)
    check_vocabulary(capture.model, split.examples, config.template)
    return collect(config, capture, split, config.split, load_moments(checkpoint), path, progress)


def checkpoint_capture(config: RunConfig, checkpoint: Path, pad_token_id: int) -> Capture:
    """The base model with `checkpoint`'s adapter, ready for a pass."""
    dtype = compute_dtype(config)
    model = on_device(load_adapter(load_frozen_model(config), checkpoint, config))
    return make_capture(model, dtype, pad_token_id, config.token_budget)


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
) -> Path:
    """Write the projected directions of every row of `split` into the store `path`.

    Rows that a former run of the same command committed are kept; batches are cut from all rows, so the
    rest are computed in the same company, and on a processor come out with the same bits.

    Args:
        moments: of the optimizer at these parameters; needed for `adam` only.
        cache: replace a store that came from something else, rather than refuse.
    """
    step = moments.step if moments else 0
    learning_rate = moments.learning_rate if moments else config.learning_rate
    manifest = describe(config, capture, split, split_name, moments, step, learning_rate)
    direction = make_direction(manifest["gradient_type"], config.adam_formula, moments, capture.slots)
    projector = make_projector(
        config.projector, capture.parameters, manifest["proj_dim"], config.proj_seed, capture.device
    )
    if processes.rank() == 0:
        _prepare_store(path, manifest, split, config.overwrite, cache)
    processes.barrier()
    with GradientStore(path) as store:
        if config.token_budget is None:  # the memory that is free now may ask for another cut
            capture = replace(capture, token_budget=store.manifest.get("token_budget", capture.token_budget))
        done = store.done.astype(bool)
        bad = [split.examples[index] for index in np.flatnonzero(store.bad)]
    if bad and not config.skip_bad_rows:
        raise DataflexError(f"gradient store {path}: {name_bad_rows(bad)}; give --skip-bad-rows, or --overwrite")
    batches = [batch for batch in batches_of(capture, split.examples, manifest["proj_dim"]) if not done[batch].all()]
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
    )
    # the other processes hand their rows to the first: one writer, whatever the file system
    with StoreWriter(path) if processes.rank() == 0 else contextlib.nullcontext() as writer:
        try:
            for rows in computed:
                shares = processes.gather((rows.indices, rows.vectors.cpu().numpy(), rows.loss.cpu().numpy()))
                for indices, vectors, loss in shares:
                    if indices:
                        writer.write(indices, vectors, loss)
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


def _prepare_store(path: Path, manifest: dict[str, Any], split: Split, overwrite: bool, cache: bool) -> None:
    """Make the store, or see that the one there is a part of this same work."""
    if path.exists() and not overwrite:
        try:
            with GradientStore(path) as store:
                check_same(path, store.manifest, manifest)
                store.require_sound()
            return
        except UsageError:
            if not cache:
                raise
    create_store(
        path,
        manifest=manifest,
        row=np.array([example.row for example in split.examples]),
        tokens=np.array([sum(label != -100 for label in example.labels[1:]) for example in split.examples]),
        subtask=subtask_names(split),
    )


def subtask_names(split: Split) -> list[str] | None:
    """Each row's subtask, or None where no row has one."""
    names = [example.subtask for example in split.examples]
    return [name or "" for name in names] if any(names) else None

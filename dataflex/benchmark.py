"""`bench`: gradient tokens/s against LoRA-training tokens/s, on the configuration's own model, rows and dtype.

Both sides take the same batches in turn, in one process, so that the ratio holds where the machine's speed
drifts. Training is the plain thing: forward, backward and a step of AdamW over padded rows.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataflex.config import RunConfig, needed
from dataflex.cost import (
    FEWEST_TOKENS,
    free_memory,
    gradient_flops,
    matmul_speed,
    shape_of,
    training_memory,
)
from dataflex.data.batches import collate
from dataflex.data.examples import Example, Split
from dataflex.gradients.capture import Capture, make_capture
from dataflex.gradients.direction import make_direction
from dataflex.gradients.passes import batches_of, project_rows
from dataflex.gradients.probe import TRYING, check_capture
from dataflex.lora import Slot
from dataflex.model import add_lora, compute_dtype, device, load_base_model, on_device
from dataflex.needs import check_needs
from dataflex.outline import Outline, longest_of, note_gradient_pass, note_peak, outline
from dataflex.planning import Plan, read_rows
from dataflex.progress import SILENT, Progress
from dataflex.projection.protocol import Projector
from dataflex.projection.table import check_projector, make_projector
from dataflex.provenance import device_name
from dataflex.store.manifest import Manifest
from dataflex.store.writer import StoreWriter, create_store
from dataflex.training.moments import live_moments

MOST_BATCHES = 4


def bench(config: RunConfig, progress: Progress = SILENT) -> dict[str, Any]:
    """Time training and gradients over a sample of batches, and return the figures.

    Returns:
        device, dtype; `train` and `grads` with tokens_per_s, `grads` also with seconds by part and flops_per_s;
        `matmul_flops_per_s`, what a large matrix product reaches here; `ratio`, grads over train; `peak_memory_bytes`
        of both; `sample` and `dataset` with their rows and tokens, and the seconds a gradient pass over the whole
        dataset would take.
    """
    split, sizes, capture = prepare_bench(config, Plan("bench"), progress)
    dtype = capture.dtype
    if config.token_budget is None:
        capture = replace(capture, token_budget=_budget_for_both(capture, sizes.base))
    batches = sample(batches_of(capture, split.examples, config.proj_dim or 1))

    optimizer = torch.optim.AdamW([slot.parameter for slot in capture.slots], lr=config.learning_rate)
    rows = [[split.examples[index] for index in batch] for batch in batches]
    clock, peaks = _Clock(capture.device), {"train": 0, "grads": 0}
    with progress.task("bench", 2 + 2 * len(rows), "batches") as task, tempfile.TemporaryDirectory() as folder:
        _train_step(capture, rows[0], optimizer)  # both sides once, uncounted
        task.advance(1)
        with _collector(config, capture, optimizer, clock, Path(folder)) as collect:
            collect(rows[0])
            task.advance(1)
            clock.spans.clear()
            for batch in rows:
                clock.settle()
                with _peak_memory(capture.device, peaks, "train"), clock.part("train"):
                    _train_step(capture, batch, optimizer)
                task.advance(1)
                clock.settle()
                with _peak_memory(capture.device, peaks, "grads"), clock.part("grads"):
                    collect(batch)
                task.advance(1)
    tokens = sum(len(example.input_ids) for batch in rows for example in batch)
    supervised = sum(label != -100 for batch in rows for example in batch for label in example.labels[1:])
    total = sum(split.report.lengths)
    seconds = {name: sum(lengths) for name, lengths in clock.seconds().items()}
    train, grads = seconds.pop("train"), seconds.pop("grads")
    parts = {"model": grads - sum(seconds.values()), **seconds}
    flops = gradient_flops(*sizes.multiplied, capture.parameters, tokens, supervised)
    return {
        "device": device_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "train": {"tokens_per_s": tokens / train},
        "grads": {"tokens_per_s": tokens / grads, "seconds": parts, "flops_per_s": flops / grads},
        "matmul_flops_per_s": matmul_speed(capture.device, dtype),
        "ratio": train / grads,
        "peak_memory_bytes": peaks,
        "sample": {"rows": sum(len(batch) for batch in rows), "tokens": tokens, "batches": len(rows)},
        "dataset": {"rows": len(split.examples), "tokens": total, "seconds": total * grads / tokens},
    }


def prepare_bench(config: RunConfig, plan: Plan, progress: Progress = SILENT) -> tuple[Split, Outline, Capture]:
    """Find out and check everything that `bench` needs: its rows, the sizes of its model, and the model."""
    check_needs(config, "bench")
    if not config.is_exact:
        check_projector(config.projector, needed(config.proj_dim), device())
    tokenizer, splits = read_rows(config, ["train"], plan, progress)
    split = splits["train"]
    sizes = outline(config, plan, [split])
    peaks = note_gradient_pass(config, plan, sizes, [split])
    if sizes.shape is not None:
        tokens = max(plan.sizes["token_budget"], longest_of([split]))
        peaks.append(training_memory(sizes.shape, tokens, checkpointing=False))
    note_peak(plan, sizes, peaks)
    plan.needs_weights(config, sizes.base)
    dtype = compute_dtype(config)
    model = on_device(add_lora(load_base_model(config, dtype), config))
    capture = make_capture(model, dtype, tokenizer.pad_token_id, config.token_budget)
    progress.say(TRYING)
    check_capture(capture, split.examples, progress)
    return split, sizes, capture


def _budget_for_both(capture: Capture, base_parameters: int) -> int:
    """The capture's token budget, halved until a training step over as many tokens fits as well."""
    shape, budget = (
        shape_of(capture.model.config, base_parameters, capture.parameters, capture.dtype.itemsize),
        capture.token_budget,
    )
    free = free_memory(capture.device)
    while shape and budget > FEWEST_TOKENS and training_memory(shape, budget, False) - shape.standing_bytes > free:
        budget //= 2
    return budget


def sample(batches: Sequence[list[int]]) -> list[list[int]]:
    """At most MOST_BATCHES batches, spread evenly from the longest rows to the shortest."""
    count = min(MOST_BATCHES, len(batches))
    return [batches[round(index * (len(batches) - 1) / max(1, count - 1))] for index in range(count)]


class _Clock:
    """Seconds by part. Of a GPU, those between two marks in its queue: it is not waited for, so that timing a part
    does not slow the whole."""

    def __init__(self, target: torch.device) -> None:
        self.cuda = target.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = self._mark()
        yield
        self.spans.append((name, started, self._mark()))

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait for the GPU, so that the next part is not prepared while the last still runs."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self) -> dict[str, list[float]]:
        """How long each part took, every time it ran."""
        self.settle()
        lengths: dict[str, list[float]] = {}
        for name, start, end in self.spans:
            length = start.elapsed_time(end) / 1000 if self.cuda else end - start
            lengths.setdefault(name, []).append(length)
        return lengths


def _train_step(capture: Capture, rows: list[Example], optimizer: torch.optim.Optimizer) -> None:
    capture.model.train()
    inputs = {name: tensor.to(capture.device) for name, tensor in collate(rows, capture.pad_token_id).items()}
    with capture.autocast():
        loss = capture.model(**inputs, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def _collector(
    config: RunConfig, capture: Capture, optimizer: torch.optim.Optimizer, clock: _Clock, folder: Path
) -> Iterator[Callable[[list[Example]], None]]:
    """A function that takes a batch's gradients as `grads` does, its parts timed, and waits for the disk."""
    moments = live_moments(optimizer, capture.slots, 1, config.learning_rate)
    direction = make_direction(config.gradient_type, config.adam_formula, moments, capture.slots, config.marginal)
    dim = config.proj_dim or 1
    projector = make_projector(config.projector, capture.parameters, dim, config.proj_seed, capture.device)
    manifest = Manifest(store_dtype=config.store_dtype, proj_dim=projector.dim)
    room = np.arange(4096)
    create_store(folder / "bench.h5", manifest=manifest, row=room, tokens=room, subtask=None)

    def timed_direction(slot: Slot, gradient: torch.Tensor) -> torch.Tensor:
        with clock.part("direction"):
            return direction(slot, gradient)

    timed = _TimedProjector(projector, clock)
    with StoreWriter(folder / "bench.h5") as writer:

        def collect(rows: list[Example]) -> None:
            for done in project_rows(capture, rows, [list(range(len(rows)))], timed_direction, timed):
                with clock.part("write"):
                    writer.write(done.indices, done.vectors.cpu().numpy(), done.loss.cpu().numpy())
                    writer.flush()  # or training would pay for it

        yield collect


class _TimedProjector:
    def __init__(self, projector: Projector, clock: _Clock) -> None:
        self.projector, self.clock, self.dim = projector, clock, projector.dim

    def add(self, out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
        with self.clock.part("projection"):
            self.projector.add(out, offset, values)


@contextlib.contextmanager
def _peak_memory(target: torch.device, peaks: dict[str, int], name: str) -> Iterator[None]:
    """Note the most memory held while the block ran: the GPU's, or this process's resident memory."""
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start the resident peak anew
        yield
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    peaks[name] = max(peaks[name], peak)

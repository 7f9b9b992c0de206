"""What a model's passes take, from its shape alone: memory, arithmetic, and the token budget that follows.

One model for the dry run, for `bench` and for the choice of a batch's size, so that they cannot disagree.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataflex.environment import local_world_size

# A budget above this gains no speed: two CPU cores are busy with far fewer tokens, a GPU with these.
MOST_TOKENS = {"cpu": 2048, "cuda": 16384}
FEWEST_TOKENS = 256
SHARE_OF_FREE_MEMORY = 0.7
SHARE_OF_SPEED = 0.5
"""Of the speed of a large matrix product, what a pass is taken to reach; BENCHMARKS.md has 0.40 to 0.65."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only model that its cost follows from."""

    base: int
    """Parameters of the frozen model."""
    adapter: int
    """Parameters of the LoRA pairs."""
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    itemsize: int
    """Bytes of a weight and of an activation."""

    @property
    def bytes_per_token(self) -> int:
        """What all layers keep of a token for their backward pass: about 12 vectors of hidden and 6 of intermediate
        size each."""
        return self.layers * (12 * self.hidden + 6 * self.intermediate) * self.itemsize

    @property
    def standing_bytes(self) -> int:
        """The weights, and the adapter with its gradient and two moments in float32."""
        return self.base * self.itemsize + self.adapter * 4 * 4


def shape_of(config: Any, base: int, adapter: int, itemsize: int) -> Shape | None:
    """The shape of a model from its transformers configuration; None where that does not say its layers' sizes."""
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    known = [int(size) for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    layers, hidden, intermediate = known
    return Shape(base, adapter, layers, hidden, intermediate, vocabulary=text.vocab_size, itemsize=itemsize)


def gradient_memory(shape: Shape, tokens: int) -> int:
    """Bytes at the peak of a gradient pass over `tokens` tokens; its logits are a chunk at a time."""
    return shape.standing_bytes + tokens * shape.bytes_per_token


def training_memory(shape: Shape, tokens: int, checkpointing: bool) -> int:
    """Bytes at the peak of a training step: logits, their softmax and its gradient are whole, in float32."""
    kept = tokens * shape.layers * shape.hidden * shape.itemsize if checkpointing else tokens * shape.bytes_per_token
    return shape.standing_bytes + kept + 3 * 4 * tokens * shape.vocabulary


def multiplied_weights(base: Any) -> tuple[int, int]:
    """Of a causal language model without adapters: weights that every token is multiplied with, and those of the
    output head, which only supervised tokens are. Looking a token up in the embedding multiplies nothing. All experts
    of a mixture are counted, though a token meets few."""
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    tables = embedding.numel() + (0 if head is embedding else head.numel())
    return base.num_parameters() - tables, head.numel()


def gradient_flops(body: int, head: int, adapter: int, tokens: int, supervised: int) -> int:
    """Multiplications and additions of a gradient pass, attention and projection apart: two for each weight and token
    in each direction, and two more for an adapter's, whose gradients are taken.

    Args:
        body, head: what `multiplied_weights` says.
        adapter: parameters of the LoRA pairs.
        supervised: how many of the `tokens` have a loss.
    """
    return 4 * (body * tokens + head * supervised) + 6 * adapter * tokens


def training_flops(body: int, head: int, adapter: int, tokens: int, checkpointing: bool) -> int:
    """Multiplications and additions of training on `tokens` tokens: as `gradient_flops`, with logits for every token,
    and with the forward pass of the layers once more under gradient checkpointing."""
    return gradient_flops(body, head, adapter, tokens, tokens) + 2 * (body + adapter) * tokens * checkpointing


def matmul_speed(target: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of one large matrix product, the best of some."""
    size = 8192 if target.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=target).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        left @ right
        if target.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def free_memory(device: torch.device) -> int:
    """Bytes that a batch may still take on a device: what is free, and what torch holds there without using it.

    The processes of a machine without GPUs share what the machine, or the control group they are in, has left.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max": no limit
        used = int((group / "memory.current").read_text())
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free // local_world_size()


def token_budget_for(shape: Shape | None, free: int, device_type: str) -> int:
    """The largest power of two whose activations fit well into `free` bytes, within what makes sense on the device.

    A power of two, so that a run taken up again with a little more or less memory cuts the same batches.
    """
    most = MOST_TOKENS[device_type]
    if shape is None:
        return min(most, 2048)
    tokens = most
    while tokens > FEWEST_TOKENS and tokens * shape.bytes_per_token > SHARE_OF_FREE_MEMORY * free:
        tokens //= 2
    return tokens


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left, whatever raised it."""
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)

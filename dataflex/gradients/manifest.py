"""What a gradient store came from: written into it, compared before it is gone on with or scored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch

from dataflex.config import RunConfig
from dataflex.data.examples import Split, split_names
from dataflex.errors import UsageError
from dataflex.gradients.capture import Capture
from dataflex.lora import full_value
from dataflex.masking import masked
from dataflex.model import model_fingerprint
from dataflex.provenance import device_name
from dataflex.training.moments import AdamMoments

LIBRARIES = ("dataflex", "torch", "transformers", "peft", "h5py")

# Two stores can be compared only if their rows are images under one map, taken at one set of parameters.
PROJECTION_KEYS = (
    "base_model",
    "adapter",
    "dtype",
    "projector",
    "projector_device",
    "proj_dim",
    "proj_seed",
    "parameters",
)


def describe(
    config: RunConfig,
    capture: Capture,
    split: Split,
    split_name: str,
    moments: AdamMoments | None,
    step: int,
    learning_rate: float,
) -> dict[str, Any]:
    """The manifest of a store of `split`'s directions at `capture`'s parameters."""
    gradient_type = config.eval_gradient_type if split_name == "eval" else config.gradient_type
    return {
        "model_name_or_path": masked(config.model_name_or_path),
        "base_model": masked(model_fingerprint(config)),
        "adapter": digest((slot.name, full_value(slot.parameter)) for slot in capture.slots),
        "dtype": str(capture.dtype).removeprefix("torch."),
        "split": split_name,
        "dataset": split_names(config, split_name),
        "datasets": dataset_starts(split),
        "data": split.hash,
        "files": split.files,
        "template": config.template,
        "cutoff_len": config.cutoff_len,
        "max_samples": config.max_samples,
        "train_on_prompt": config.train_on_prompt,
        "mask_history": config.mask_history,
        "gradient_type": gradient_type,
        "adam_formula": config.adam_formula if gradient_type == "adam" else None,
        "moments": _digest_moments(moments) if gradient_type == "adam" and moments is not None else None,
        "projector": config.projector,
        # fast_jl's kernels are built for one kind of GPU; the others' signs depend on nothing but the seed
        "projector_device": device_name() if config.projector == "fast_jl" else None,
        "proj_dim": capture.parameters if config.projector == "none" else config.proj_dim,
        "proj_seed": config.proj_seed,
        "store_dtype": config.store_dtype,
        "parameters": [[slot.name, slot.size] for slot in capture.slots],
        "token_budget": capture.token_budget,
        "step": step,
        "learning_rate": learning_rate,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def dataset_starts(split: Split) -> list[list[Any]]:
    """[name, first kept row] of each dataset, in row order: rows count through the datasets as named."""
    starts: dict[str, int] = {}
    for example in split.examples:
        starts[example.dataset] = min(example.row, starts.get(example.dataset, example.row))
    return sorted(([name, row] for name, row in starts.items()), key=lambda start: start[1])


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over names and float32 bytes."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(name.encode())
        total.update(tensor.detach().float().contiguous().cpu().numpy().data)
    return total.hexdigest()


def _digest_moments(moments: AdamMoments) -> str:
    both = [*moments.exp_avg.items(), *moments.exp_avg_sq.items()]
    return digest(both) + f":{moments.step}:{moments.beta1}:{moments.beta2}:{moments.eps}"


def differences(first: Mapping[str, Any], second: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """One phrase for each of `keys` on which two manifests differ."""
    phrases = []
    for key in keys:
        ours, theirs = first.get(key), second.get(key)
        if ours != theirs:
            short = all(len(str(value)) <= 60 for value in (ours, theirs))
            phrases.append(f"{key} ({ours} against {theirs})" if short else key)
    return phrases


def check_same(path: object, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a UsageError naming every difference between a store's manifest and the one this run would write."""
    keys = [key for key in wanted if key not in ("versions", "model_name_or_path", "token_budget")]
    differing = differences(found, wanted, keys)
    if differing:
        raise UsageError(
            f"gradient store {path} came from something else: {', '.join(differing)}; "
            "give --overwrite to write it anew, or another output"
        )

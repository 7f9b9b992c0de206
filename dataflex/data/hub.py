"""Datasets that `datasets.load_dataset` finds: on the Hugging Face hub, in its cache, or in a local folder."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dataflex.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HubDataset:
    """`hf_hub_url` of dataset_info.json, with its `subset` (a configuration) and `folder` (within the repository)."""

    path: str
    subset: str | None = None
    folder: str | None = None


@functools.lru_cache(maxsize=8)
def load_hub(hub: HubDataset, split: str) -> Dataset:
    """The rows of a hub's dataset, memory-mapped from the cache of `datasets`.

    Raises:
        UsageError: it is neither reachable nor in the cache, or has no such subset or split.
    """
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(hub.path, name=hub.subset, data_dir=hub.folder, split=split)
    except Exception as error:  # of the network, the hub, the repository's files or its builder
        cause = error.__cause__ or error  # datasets says no more than that an error occurred
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UsageError(
            f"dataset {hub.path}, split {split}: cannot be loaded from the hub or its cache ({reason}); "
            "check the name and the network, or download the data and give file_name"
        ) from None
    finally:
        if not shown:
            datasets.enable_progress_bars()

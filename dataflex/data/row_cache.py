"""Encoded rows kept by what they were made from, in the cache folder of `datasets`.

A file's name is a hash of everything its rows depend on, this package's own code included: nothing stale is
ever read, and nothing need be compared. A file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex import json_text
from dataflex.data.rows import Rows, write_batches
from dataflex.files import atomic
from dataflex.locks import Lock

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

MakeBatches = Callable[[], Iterable["pyarrow.RecordBatch"]]


def cache_dir() -> Path:
    """Where encoded rows are kept: in the folder in which `datasets` keeps its own."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets") / "dataflex"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """sha256 (hex) over a tokenizer as it acts, None if it cannot be told from others.

    Only tokenizers of the `tokenizers` library can be written down whole.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = (type(tokenizer).__name__, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template)
    return hashlib.sha256(f"{backend.to_str()}{special!r}".encode()).hexdigest()


def row_key(*made_from: Any) -> str:
    """A name for rows made by this package's code from what is given."""
    digest = hashlib.sha256(_code())
    digest.update(json.dumps(made_from, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def cached_rows(key: str | None, datasets: Sequence[str], make: MakeBatches, *, anew: bool, keep: bool) -> Rows:
    """The rows kept under `key`, or those that `make` gives.

    Args:
        datasets: names of the datasets, in order.
        anew: make them, also where they are kept.
        keep: keep them if they are made; else, and where the cache cannot be written, their file has no name
            and ends with the process.
    """
    if key is None:
        return _unnamed_rows(datasets, make)
    path = cache_dir() / f"{key}.arrow"
    if path.is_file() and not anew:
        return Rows(path, datasets)
    if not keep or not _writable(path.parent):
        return _unnamed_rows(datasets, make)
    # one process at a time
    with Lock(path.with_suffix(".lock"), wait=True):
        if not path.is_file() or anew:  # a process beside this one may have made it meanwhile
            with atomic(path, "wb") as handle:
                write_batches(handle, make())
        return Rows(path, datasets)


def _unnamed_rows(datasets: Sequence[str], make: MakeBatches) -> Rows:
    with tempfile.NamedTemporaryFile(prefix="dataflex-", suffix=".arrow") as handle:
        write_batches(handle, make())
        handle.flush()
        return Rows(Path(handle.name), datasets)


def _writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


def _code() -> bytes:
    """A hash of the source code that encodes rows, and of the versions of the libraries that it calls."""
    import tokenizers

    digest = hashlib.sha256(tokenizers.__version__.encode())
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(json_text.__file__)]:
        digest.update(path.read_bytes())
    return digest.digest()

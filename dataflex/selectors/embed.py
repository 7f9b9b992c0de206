"""`component_name: embed`: rows whose sentence embeddings are near the validation rows', of any model that
sentence-transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import processes
from dataflex.config import needed
from dataflex.data.examples import Example
from dataflex.errors import UsageError, reason_of
from dataflex.fingerprints import file_hashes
from dataflex.influence.scores import Scores
from dataflex.model import device
from dataflex.selectors.bm25 import texts
from dataflex.selectors.protocol import Situation
from dataflex.selectors.similarity import cosines, once, scores_of_similarities

AT_ONCE = 256  # rows between two signs of progress


class EmbedSelector:
    """The model of `embed_model` reads the text of each row once a run."""

    def score(self, situation: Situation) -> Scores:
        name = situation.config.embed_model
        if name is None:
            raise UsageError("selector 'embed' needs embed_model: the folder or hub id of a sentence-embedding model")

        def make() -> Scores:
            model = load_embedder(name)
            train = embed(model, situation, situation.train.examples, "train embeddings")
            validation = embed(model, situation, situation.validation.examples, "eval embeddings")
            return scores_of_similarities(situation, cosines(validation, train, situation))

        return once(situation, "embed", [situation.train.facts.get("tokenizer"), *_content(name)], make)


def _content(name: str) -> list[str]:
    """What tells an embedding model from another: the bytes of its files, or the hub id."""
    folder = Path(name)
    if not folder.is_dir():
        return [name]
    return file_hashes(sorted(path for path in folder.rglob("*") if path.is_file()))


def load_embedder(name: str) -> Any:
    """The model of a folder or hub id.

    Raises:
        UsageError: where sentence-transformers is not installed, or cannot load the model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UsageError(
            "selector 'embed' needs sentence-transformers: pip install 'sentence-transformers>=6.2'"
        ) from None
    try:
        return SentenceTransformer(name, device=str(device()))
    except Exception as error:
        raise UsageError(
            f"embed_model: cannot load {name}: {reason_of(error)}; name the folder or hub id of a sentence-embedding "
            "model"
        ) from error


def embed(model: Any, situation: Situation, examples: Sequence[Example], description: str) -> np.ndarray:
    """[N, d] float32: the embedding of each row's text. Each process takes its share; collective."""
    mine = range(processes.rank(), len(examples), processes.size())
    parts = []
    with situation.progress.task(description, len(mine), "rows") as task:
        for start in range(0, len(mine), AT_ONCE):
            rows = [examples[index] for index in mine[start : start + AT_ONCE]]
            parts.append(model.encode(list(texts(situation, rows)), convert_to_numpy=True, show_progress_bar=False))
            task.advance(len(rows))
    shares = processes.gather(np.concatenate(parts) if parts else np.zeros((0, 0)))
    whole: np.ndarray | None = None
    if processes.rank() == 0:
        whole = np.empty((len(examples), shares[0].shape[1]), dtype=np.float32)
        for first, share in enumerate(shares):
            if len(share):
                whole[first :: processes.size()] = share
    return needed(processes.broadcast(whole))

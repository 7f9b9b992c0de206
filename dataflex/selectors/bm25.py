"""`component_name: bm25`: rows whose words are the validation rows' words (Lucene's BM25, by the package bm25s)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dataflex.data.examples import Example
from dataflex.files import scratch_array
from dataflex.influence.scores import Scores
from dataflex.selectors.protocol import Situation
from dataflex.selectors.similarity import once, scores_of_similarities

# Han, kana and Hangul are written without spaces: each of their characters is a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class Bm25Selector:
    """Each validation row asks for the training rows; the text is that of the encoded rows, prompt and response."""

    def score(self, situation: Situation) -> Scores:
        return once(situation, "bm25", [situation.train.facts.get("tokenizer")], lambda: _scores(situation))


def _scores(situation: Situation) -> Scores:
    validation, train = situation.validation.examples, situation.train.examples
    similarities = scratch_array((len(validation), len(train)), np.float32, situation.memory)
    documents = (words(text) for text in texts(situation, train))
    with situation.progress.task("BM25", len(validation), "rows") as task:
        for index, found in enumerate(bm25(documents, (words(text) for text in texts(situation, validation)))):
            similarities[index] = found
            task.advance()
    return scores_of_similarities(situation, similarities)


def texts(situation: Situation, examples: Sequence[Example]) -> Iterator[str]:
    """The text of each row as it is encoded, without special tokens."""
    for example in examples:
        yield situation.tokenizer.decode(example.input_ids, skip_special_tokens=True)


def words(text: str) -> list[str]:
    """The words of a text, case-folded: runs of letters and digits, and each character of a script without spaces."""
    return _WORD.findall(text.casefold())


def bm25(documents: Iterable[list[str]], queries: Iterable[list[str]]) -> Iterator[np.ndarray]:
    """For each query [N] float32: Σ over its words w of idf(w) · tf / (tf + 1.5·(0.25 + 0.75·|d|/mean |d|)), with
    idf(w) = ln(1 + (N − n_w + 0.5)/(n_w + 0.5)). A word that stands twice in a query counts twice."""
    import bm25s

    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    held = list(documents)
    index.index(held, show_progress=False)
    for query in queries:
        yield index.get_scores(query) if query else np.zeros(len(held), dtype=np.float32)

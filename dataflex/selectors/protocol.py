"""The input and the output of a selector."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from dataflex.config import RunConfig
from dataflex.data.examples import Split
from dataflex.errors import DataflexError, UsageError
from dataflex.gradients.capture import Capture
from dataflex.influence.scores import Scores, scores_of
from dataflex.progress import Progress
from dataflex.training.moments import AdamMoments


def one_number_a_row(what: str, values: object, rows: int) -> np.ndarray:
    """`values` as [rows] float64; a DataflexError about `what` unless they are as many real numbers."""
    expected = f"expected {rows} real numbers, one for each training row"
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of unequal length; a tensor on a GPU
        raise DataflexError(f"{what} is a {type(values).__name__} that is no array ({error}); {expected}") from None
    if array.dtype.kind not in "fiu" or array.shape != (rows,):
        raise DataflexError(f"{what} is an array of {array.dtype} of shape {list(array.shape)}; {expected}")
    return array.astype(np.float64)


@dataclass(frozen=True)
class Situation:
    """Rows to be scored: between two optimizer steps of a run, or at a checkpoint. Selectors leave the model as they
    find it."""

    config: RunConfig
    tokenizer: Any
    train: Split
    compared_with: Split | None
    """The validation rows; None where `score` was given none."""
    open_capture: Callable[[], Capture]
    """Loads the model where it is not loaded; called once."""
    moments: AdamMoments | None
    """AdamW's moments after `step` steps, live in a run; None where the checkpoint has none."""
    step: int
    """The optimizer steps that have been taken."""
    cache: Path
    """A folder for the gradient stores of this selection."""
    memory: Path
    """The run's folder of selections, where a selector may leave `step-<s>.safetensors` for those to come."""
    past_steps: list[int]
    """The steps of the selections before this one."""
    progress: Progress

    @functools.cached_property
    def capture(self) -> Capture:
        """The model with its adapter, ready for a pass."""
        return self.open_capture()

    @property
    def validation(self) -> Split:
        """The validation rows.

        Raises:
            UsageError: where there are none.
        """
        if self.compared_with is None:
            raise UsageError(
                f"selector {self.config.selector!r} compares rows with validation rows; set eval_dataset, or val_size"
            )
        return self.compared_with

    def scores(self, score: ArrayLike, subtasks: Mapping[str, ArrayLike] | None = None) -> Scores:
        """What `Selector.score` returns.

        Args:
            score: [N] real numbers, one for each of `train.examples` in their order; the highest are selected, and a
                row that is NaN is never selected.
            subtasks: [N] real numbers for each subtask of the validation rows, to be kept beside the score.

        Raises:
            DataflexError: naming the selector, for anything else.
        """
        rows, selector = len(self.train.examples), f"selector {self.config.selector!r}"
        parts = {
            name: one_number_a_row(f"{selector}: subtask {name!r}", values, rows)
            for name, values in (subtasks or {}).items()
        }
        return scores_of(
            self.train.examples,
            len(self.config.dataset or []) > 1,
            one_number_a_row(f"{selector}: score", score, rows),
            parts,
        )


class Selector(Protocol):
    """Scores the training rows; the best are taken. Made once a run, without arguments."""

    def score(self, situation: Situation) -> Scores:
        """A score for every training row, in the order of `situation.train.examples`: see `Situation.scores`.

        Every process of a run calls it; the first process's scores decide.
        """

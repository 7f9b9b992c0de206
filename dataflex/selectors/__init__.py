"""What `component_name` names. A selector looks at a training run that stands still and picks its next rows.

To add one: a file with a class that has `select`, and its name here and in RunConfig.selector.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dataflex.config import RunConfig
from dataflex.data.examples import Split
from dataflex.gradients.capture import Capture
from dataflex.influence.scores import Scores
from dataflex.progress import Progress
from dataflex.training.moments import AdamMoments


@dataclass(frozen=True)
class Situation:
    """A run between two optimizer steps. Selectors leave the model as they find it."""

    config: RunConfig
    capture: Capture
    train: Split
    validation: Split
    moments: AdamMoments
    """Live: after `moments.step` steps, the step before which rows are selected."""
    cache: Path
    """A folder for this selection's gradient stores."""
    memory: Path
    """The run's folder of selections, where a selector may leave `step-<s>.safetensors` for those to come."""
    past_steps: list[int]
    """The steps of the selections before this one."""
    progress: Progress


class Selector(Protocol):
    """Scores the training rows; the best are taken."""

    def score(self, situation: Situation) -> Scores:
        """A score for every training row, in the order of `situation.train.examples`."""


def make_selector(config: RunConfig) -> Selector:
    """The selector that `component_name` stands for."""
    from dataflex.selectors.less import LessSelector
    from dataflex.selectors.random import RandomSelector

    return {"less": LessSelector, "random": RandomSelector}[config.selector]()

"""`component_name: length`: a control. What looks like a good selector may only like long rows."""

from __future__ import annotations

from dataflex.data.rows import supervised_tokens
from dataflex.influence.scores import Scores
from dataflex.selectors.protocol import Situation


class LengthSelector:
    """A row's score is the number of its supervised tokens."""

    def score(self, situation: Situation) -> Scores:
        return situation.scores(supervised_tokens(situation.train.examples))

"""The `keys` command: every key that a YAML may set, with its default, its help and the commands that use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dataflex.config import MARKS, RunConfig, default_of, help_of
from dataflex.errors import UsageError
from dataflex.keys import Decides
from dataflex.named import suggestion

HEADINGS = {
    Decides.ROWS: "Which rows, and their tokens",
    Decides.MODEL: "The base model",
    Decides.TRAINING: "Training",
    Decides.DIRECTION: "The direction of a row",
    Decides.PROJECTION: "The projection",
    Decides.STORE: "Stored numbers",
    Decides.SCORES: "Scores",
    Decides.SELECTION: "Which scored rows are written",
    Decides.MERGE: "Merging",
    Decides.EVALUATION: "Evaluating",
    Decides.COMPARISON: "Comparing",
    Decides.NOTHING: "How the work is done; results stay the same",
}
"""The heading of each part of a result that keys decide, in the order of the work."""

HANDED_ON = "handed to transformers' TrainingArguments as it stands"


@dataclass(frozen=True)
class KeyFacts:
    """What is to be known of a key."""

    key: str
    heading: str
    default: Any
    help: str
    used_by: tuple[str, ...]


def key_facts(word: str | None = None) -> list[KeyFacts]:
    """Every key, or those with `word` in their name or help, grouped by what they decide.

    Raises:
        UsageError: where no key has the word.
    """
    found = []
    for decides, heading in HEADINGS.items():
        for key, mark in MARKS.items():
            if mark.decides is decides and key != "training_arguments":
                text = help_of(key) if key in RunConfig.model_fields else HANDED_ON
                found.append(KeyFacts(key, heading, default_of(key), text, mark.users))
    if word is None:
        return found
    having = [facts for facts in found if word.lower() in facts.key.lower()]
    having += [facts for facts in found if facts not in having and word.lower() in facts.help.lower()]
    if not having:
        raise UsageError(f"no key has {word!r} in its name or help{suggestion(word, [facts.key for facts in found])}")
    return having

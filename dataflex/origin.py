"""The origin of a result, told by content; and the differences of two origins, explained by facts kept beside them.

Two origins are equal when the keys that the command uses and the fingerprints of its inputs are equal. The facts
have no part in that; they say why a fingerprint is another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dataflex.config import MARKS, RunConfig, default_of, values_of
from dataflex.keys import TRAINS, select_keys
from dataflex.masking import masked

LONGEST_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Origin:
    """Everything that decides the result of a command, as JSON values."""

    command: str
    keys: Mapping[str, Any]
    """The values of the keys that the command uses and that decide its result by themselves."""
    content: Mapping[str, str | None]
    """Fingerprints of the inputs by name; None for an input that the command does without."""
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By the same names: what each input was made from."""

    def as_json(self) -> dict[str, Any]:
        """The origin as a JSON object."""
        return {
            "command": self.command,
            "keys": dict(self.keys),
            "content": dict(self.content),
            "facts": {name: dict(facts) for name, facts in self.facts.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> Origin:
        """The origin that `as_json` wrote.

        Raises:
            ValueError: for anything else, an origin of an earlier version of this program included.
        """
        parts = [value.get(name) for name in ("keys", "content", "facts")] if isinstance(value, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("not an origin that this version wrote")
        return cls(str(value.get("command")), *parts)

    def differences(self, now: Origin) -> list[str]:
        """A phrase for everything in which `now` is another origin than this one; empty where they are equal.

        A key that this origin does not know had its default value then.
        """
        if self.command != now.command:
            return [_phrase("command", self.command, now.command)]
        phrases = [
            _phrase(key, self.keys.get(key, default_of(key)), value)
            for key, value in now.keys.items()
            if self.keys.get(key, default_of(key)) != value
        ]
        for name, fingerprint in now.content.items():
            if self.content.get(name) != fingerprint:
                phrases += explain(name, self.facts.get(name, {}), now.facts.get(name, {}))
        return list(dict.fromkeys(phrases))


def origin(
    config: RunConfig, command: str, content: Mapping[str, str | None], facts: Mapping[str, Mapping[str, Any]]
) -> Origin:
    """The origin of what `command` makes of `config` and of inputs with these fingerprints and facts."""
    keys = select_keys(MARKS, lambda mark: mark.compared and command in mark.users)
    values = values_of(config, keys)
    if command in TRAINS:
        values["rows_per_step"] = config.rows_per_step
    return Origin(command, masked(values), dict(content), masked({name: dict(found) for name, found in facts.items()}))


def explain(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why the input `name` has another fingerprint: the facts that differ, or its name where none does."""
    differing = [fact for fact in {**now, **before} if before.get(fact) != now.get(fact)]
    return [
        _phrase(fact if fact in MARKS else f"{name}: {fact}", before.get(fact), now.get(fact)) for fact in differing
    ] or [name]


def _phrase(name: str, before: Any, now: Any) -> str:
    short = all(len(str(value)) <= LONGEST_SHOWN for value in (before, now))
    return f"{name} ({before} then, {now} now)" if short else name

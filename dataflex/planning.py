"""What a command finds out before it writes anything: `--dry-run` shows it, the run acts on it.

Beside the function of each command stands `prepare_COMMAND`, which finds out and checks everything before the first
write. The run calls it, and so does the dry run, which describes what was found. A dry run asks no network, keeps no
cache and loads no large weights: where one of these would be next, the preparation raises NotHere and the dry run ends
there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dataflex import HOMES
from dataflex.config import RunConfig, needed
from dataflex.data.examples import Split, load_split
from dataflex.data.preview import first_row, summary
from dataflex.errors import UsageError
from dataflex.model_files import is_hub_id
from dataflex.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FUNCTIONS = {"eval": "evaluate"}
"""The library's functions of another name than their command's; Python has an `eval` of its own."""
MAX_TRIED_PARAMETERS = 1 << 30  # of a base model that a dry run loads: 4 GiB in float32


@dataclass
class Plan:
    """The findings of a preparation; what could not be found out says why in `unknown`."""

    command: str
    dry_run: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def needs_weights(self, config: RunConfig, base_parameters: int) -> None:
        """Raise NotHere where a dry run does not load the base model's weights."""
        if not self.dry_run:
            return
        if not Path(needed(config.model_name_or_path)).exists():
            raise NotHere("gradients: they are tried once the model's weights are here")
        if base_parameters > MAX_TRIED_PARAMETERS:
            raise NotHere("gradients: the command tries two rows once it has loaded the model")

    @contextlib.contextmanager
    def needs_hub(self, config: RunConfig, what: str) -> Iterator[None]:
        """Raise NotHere, which begins with `what`, where a dry run does not find a model of the hub on this disk."""
        try:
            yield
        except UsageError as error:
            if self.dry_run and is_hub_id(needed(config.model_name_or_path)):
                raise NotHere(f"{what}. {error}") from None
            raise


class NotHere(UsageError):
    """What comes next needs something that a dry run does not fetch or load."""


def plan(config: RunConfig, command: str, progress: Progress = SILENT) -> Plan:
    """Prepare `command` and say what was found; nothing is written.

    Raises:
        UsageError: for whatever would stop the command before it writes anything.
    """
    found = Plan(command, dry_run=True, config=config.model_dump(mode="json", exclude_none=True))
    name = FUNCTIONS.get(command, command)
    prepare: Callable[[RunConfig, Plan, Progress], Any] = getattr(import_module(HOMES[name]), f"prepare_{name}")
    try:
        prepare(config, found, progress)
    except NotHere as reason:
        found.unknown.append(str(reason))
    return found


def read_rows(
    config: RunConfig, names: Sequence[Literal["train", "eval"]], plan: Plan, progress: Progress
) -> tuple[PreTrainedTokenizerBase, dict[str, Split]]:
    """The tokenizer and the splits `names`, noted in `plan`."""
    from dataflex.model import load_tokenizer

    with plan.needs_hub(config, "rows and sizes: they follow from the model's tokenizer and config"):
        tokenizer = load_tokenizer(config, local_only=plan.dry_run)
    splits: dict[str, Split] = {}
    for name in names:
        splits[name] = load_split(config, tokenizer, name, progress, keep=not plan.dry_run)
        if plan.dry_run:
            split = splits[name]
            plan.data[name] = {**summary(split.report), "example": first_row(split.examples, tokenizer)}
    return tokenizer, splits

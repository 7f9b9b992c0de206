"""From a config to Examples: the rows of its datasets as token ids and labels, and a report of what became of each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dataflex.config import RunConfig, require
from dataflex.data.catalog import find_sources
from dataflex.data.chat_template import check_chat_template, encode_chat_turns
from dataflex.data.conversations import Conversation, Unusable, to_conversation
from dataflex.data.encoding import UNSUPERVISED, Encoded, encode_row
from dataflex.data.records import Source, data_hash, read_records
from dataflex.data.templates import Thinking, encode_turns, find_template, prepare_tokenizer
from dataflex.errors import UsageError
from dataflex.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTHING_SUPERVISED = "no supervised token within cutoff_len"


@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready for the model.

    `row` counts through the datasets in the order named, before any row was dropped. `labels` are -100
    where unsupervised. `subtask` is the record's own, else its dataset's name where several are given.
    """

    row: int
    input_ids: list[int]
    labels: list[int]
    subtask: str | None
    dataset: str


@dataclass
class Report:
    """What became of the rows of a split."""

    seen: int = 0
    """Rows looked at: all of the files' but those left out by num_samples or max_samples."""
    kept: int = 0
    """Rows that became examples."""
    truncated: int = 0
    """Kept rows that lost tokens to cutoff_len."""
    lost_end: int = 0
    """Kept rows whose last response lost its end."""
    supervised_tokens: int = 0
    """Tokens that are learned from, over the kept rows."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each kept row."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Row numbers of the rows that cannot be used, by reason."""

    def length_quantile(self, share: float) -> int:
        """The length that `share` (0 to 1) of the kept rows do not exceed; 0 without rows."""
        if not self.lengths:
            return 0
        return sorted(self.lengths)[max(math.ceil(share * len(self.lengths)), 1) - 1]


@dataclass(frozen=True)
class Split:
    """The training or the validation data of a run. `hash`: sha256 over the bytes of its files."""

    examples: list[Example]
    report: Report
    hash: str


def load_examples(config: RunConfig, split: Literal["train", "eval"] = "train") -> list[Example]:
    """The rows of `dataset` (train) or `eval_dataset` (eval) as the model is trained on them, in row order."""
    from dataflex.model import load_tokenizer

    return load_split(config, load_tokenizer(config), split).examples


def load_split(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Literal["train", "eval"] = "train",
    progress: Progress = SILENT,
) -> Split:
    """Read, convert and encode the datasets of a split. The tokenizer gets the template's special tokens.

    Raises:
        UsageError: no dataset is set, one cannot be read, the template is unknown, or no row can be used.
    """
    key = "dataset" if split == "train" else "eval_dataset"
    require(config, f"split {split}", key)
    names = getattr(config, key)
    encode = row_encoder(config, tokenizer)
    sources = find_sources(names, config.dataset_dir)
    datasets = [read_records(source) for source in sources]
    picked = pick_rows(sources, [len(records) for records in datasets], config.max_samples, config.seed)

    report, examples, start = Report(), [], 0
    with progress.task("tokenizing", sum(map(len, picked)), "rows") as task:
        for source, records, places in zip(sources, datasets, picked, strict=True):
            for place in places:
                row, record = start + place, records[place]
                try:
                    encoded = encode(to_conversation(source, record))
                    _note(report, encoded)
                    subtask = _subtask(record, source.name if len(sources) > 1 else None)
                    examples.append(Example(row, encoded.input_ids, encoded.labels, subtask, source.name))
                except Unusable as reason:
                    report.dropped.setdefault(str(reason), []).append(row)
                task.advance(1)
            start += len(records)
    report.seen, report.kept = sum(map(len, picked)), len(examples)
    if not examples:
        raise UsageError(_nothing_left(key, names, report))
    return Split(examples, report, data_hash(sources))


def row_encoder(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[Conversation], Encoded]:
    """How this run encodes a conversation. Gives the tokenizer the template's special tokens.

    Raises:
        UsageError: no such template, no chat template to fall back on, or train_on_prompt with a template
            whose turns end without a token.
    """
    template = find_template(config.template) if config.template is not None else None
    if template is None:
        check_chat_template(tokenizer)
    elif template.efficient_eos and config.train_on_prompt:
        raise UsageError(f"template {config.template!r} cannot train_on_prompt: its turns end without a token")
    prepare_tokenizer(tokenizer, template)
    thinking = Thinking(config.enable_thinking, last_only=config.mask_history and not config.preserve_thinking)
    efficient_eos = tokenizer.eos_token_id if template is not None and template.efficient_eos else None

    def encode(conversation: Conversation) -> Encoded:
        if template is None:
            turns = encode_chat_turns(tokenizer, conversation, config.enable_thinking)
        else:
            turns = encode_turns(template, tokenizer, conversation, thinking)
        return encode_row(
            turns,
            config.cutoff_len,
            train_on_prompt=config.train_on_prompt,
            mask_history=config.mask_history,
            efficient_eos=efficient_eos,
        )

    return encode


def pick_rows(
    sources: Sequence[Source], sizes: Sequence[int], max_samples: int | None, seed: int
) -> list[Sequence[int]]:
    """The places used of each source, ascending: of its num_samples drawn at random, the first max_samples drawn."""
    picked: list[Sequence[int]] = []
    for source, size in zip(sources, sizes, strict=True):
        places: Sequence[int] = range(size)
        if source.num_samples is not None:
            if source.num_samples > size:
                # LLaMA-Factory repeats rows here; a row number could then no longer tell them apart.
                raise UsageError(
                    f"dataset {source.name!r}: num_samples is {source.num_samples}, but it has {size} rows; lower it"
                )
            places = random.Random(f"{seed}/{source.name}").sample(range(size), source.num_samples)
        picked.append(sorted(places[:max_samples]))
    return picked


def _note(report: Report, encoded: Encoded) -> None:
    # The first label has no token before it to be predicted from.
    supervised = sum(label != UNSUPERVISED for label in encoded.labels[1:])
    if not supervised:
        raise Unusable(NOTHING_SUPERVISED)
    report.truncated += encoded.truncated
    report.lost_end += encoded.lost_end
    report.supervised_tokens += supervised
    report.lengths.append(len(encoded.input_ids))


def _subtask(record: dict[str, Any], default: str | None) -> str | None:
    subtask = record.get("subtask")
    return subtask if isinstance(subtask, str) else default


def _nothing_left(key: str, names: Sequence[str], report: Report) -> str:
    reasons = [f"  row {rows[0]}: {reason} ({len(rows)} rows so)" for reason, rows in report.dropped.items()]
    return "\n".join([f"{key} {', '.join(names)}: none of {report.seen} rows can be used", *reasons])

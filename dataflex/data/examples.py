"""From a config to Examples: the rows of its datasets as token ids and labels, and a report of what became of each."""

from __future__ import annotations

import datetime
import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dataflex.config import ROW_KEYS, RunConfig, require, values_of
from dataflex.data.catalog import find_sources
from dataflex.data.chat_template import check_chat_template, encode_chat_turns
from dataflex.data.completeness import find_missing
from dataflex.data.conversations import Conversation
from dataflex.data.encoding import Encoded, encode_row
from dataflex.data.preprocess import encode_records
from dataflex.data.records import Source, count_records, data_hash, file_sizes
from dataflex.data.report import Report
from dataflex.data.row_cache import cached_rows, row_key, tokenizer_fingerprint
from dataflex.data.rows import Example
from dataflex.data.template_table import Template
from dataflex.data.templates import Thinking, encode_turns, find_template, prepare_tokenizer, warn_of_foreign_system
from dataflex.environment import local_rank
from dataflex.errors import UsageError
from dataflex.progress import SILENT, Progress

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Report", "Split", "load_examples", "load_split", "row_encoder"]


_TOLD_OTHERWISE = ("dataset", "eval_dataset", "dataset_dir", "template", "prompt_date", "split")
"""Keys whose meaning, rather than their value, stands among a split's facts."""


@dataclass(frozen=True)
class Split:
    """The training or the validation data of a run."""

    examples: Sequence[Example]
    """May be larger than memory: each is read from disk when it is asked for."""
    report: Report
    fingerprint: str
    """sha256 (hex) over row, input_ids, labels, subtask and dataset of every example."""
    files: str
    """sha256 (hex) over the bytes of the data files."""
    facts: dict[str, Any]
    """What the examples were made from, by the name under which a difference is told: keys, files, tokenizer."""


def part_of(split: Split, indices: Sequence[int]) -> Split:
    """The rows of a split at `indices`."""
    digest = hashlib.sha256(f"{split.fingerprint} {list(indices)}".encode()).hexdigest()
    return replace(split, examples=[split.examples[index] for index in indices], fingerprint=digest)


def load_examples(config: RunConfig, split: Literal["train", "eval"] = "train") -> list[Example]:
    """The rows of `dataset` (train) or `eval_dataset` (eval) as the model is trained on them, in row order."""
    from dataflex.model import load_tokenizer

    return list(load_split(config, load_tokenizer(config), split).examples)


def load_split(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Literal["train", "eval"] = "train",
    progress: Progress = SILENT,
    keep: bool = True,
) -> Split:
    """Read, convert and encode the datasets of a split. The tokenizer gets the template's special tokens.

    With `val_size`, both splits are of `dataset`. What was encoded before is taken from the cache; `keep`
    False adds nothing to it.

    Raises:
        UsageError: no dataset is set, one cannot be read, the template is unknown, or no row can be used.
    """
    names = split_names(config, split)
    config = dated(config)
    encode = row_encoder(config, tokenizer)
    sources = find_sources(names, config.dataset_dir)
    files = data_hash(sources)
    facts = {
        "data files": files,
        **{f"dataset_info.json of {source.name!r}": _layout(source) for source in sources},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": _template_text(config, tokenizer),
        "dataset": names,
        **values_of(config, [key for key in ROW_KEYS if key not in _TOLD_OTHERWISE]),
    }
    if _is_dated(config, tokenizer):
        facts["prompt_date"] = str(config.prompt_date)
    if config.val_size or any(source.num_samples for source in sources):
        facts["seed"] = config.seed
    made_from = {**facts, "split": split if config.val_size else None}

    def make() -> Iterator[pyarrow.RecordBatch]:
        indices: Sequence[Sequence[int]] = pick_rows(
            sources, [count_records(source) for source in sources], config.max_samples, config.seed
        )
        if config.val_size:
            indices = hold_out(indices, config.val_size, config.seed, split)
        with progress.task("tokenizing", sum(map(len, indices)), "rows") as task:
            for batch in encode_records(sources, indices, encode, config.preprocessing_num_workers):
                task.advance(batch.num_rows)
                yield batch

    rows = cached_rows(
        row_key(made_from, file_sizes(sources)) if facts["tokenizer"] else None,
        [source.name for source in sources],
        make,
        anew=config.overwrite_cache and local_rank() == 0,
        keep=keep,
    )
    report = rows.report()
    if not rows:
        raise UsageError(_nothing_left(_key_of(config, split), names, report))
    told = told_name(config, split)
    progress.say(report.summary(told))
    if config.template is not None:
        warn_of_foreign_system(config.template, tokenizer)
    for warning in (*report.warnings(told), *_cut_by_max_samples(config, split, sources)):
        warnings.warn(warning, stacklevel=2)
    return Split(rows, report, rows.fingerprint, files, _shortened(facts))


def told_name(config: RunConfig, split: str) -> str:
    """What the log calls the rows of a split: held-out ones are read as validation rows."""
    is_held_out = split == "eval" and config.held_out is not None and config.eval_dataset == config.held_out
    return "held-out data" if is_held_out else f"{split} data"


def dated(config: RunConfig, kept: str | None = None) -> RunConfig:
    """`config` with the day that dated prompts tell: its own, else the day `kept` by what is taken up again, else
    today."""
    if config.prompt_date is not None:
        return config
    day = datetime.date.fromisoformat(kept) if kept else datetime.date.today()
    return config.model_copy(update={"prompt_date": day})


def split_names(config: RunConfig, split: str) -> list[str]:
    """The datasets that the rows of `split` come from; a UsageError if none is set."""
    key = _key_of(config, split)
    require(config, f"split {split}", key)
    return getattr(config, key)


def row_encoder(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[Conversation], Encoded]:
    """How this run encodes a conversation. Gives the tokenizer the template's special tokens.

    Raises:
        UsageError: no such template, no chat template to fall back on, or train_on_prompt with a template
            whose turns end without a token.
    """
    template = _template(config)
    if template is None:
        check_chat_template(tokenizer)
    elif template.efficient_eos and config.train_on_prompt:
        raise UsageError(f"template {config.template!r} cannot train_on_prompt: its turns end without a token")
    prepare_tokenizer(tokenizer, template)
    thinking = Thinking(config.enable_thinking, last_only=config.mask_history and not config.preserve_thinking)
    day = config.prompt_date or datetime.date.today()
    efficient_eos = tokenizer.eos_token_id if template is not None and template.efficient_eos else None

    def encode(conversation: Conversation) -> Encoded:
        if template is None:
            turns = encode_chat_turns(tokenizer, conversation, config.enable_thinking, day)
        else:
            turns = encode_turns(template, tokenizer, conversation, thinking, day)
        row = encode_row(
            turns,
            config.cutoff_len,
            train_on_prompt=config.train_on_prompt,
            mask_history=config.mask_history,
            efficient_eos=efficient_eos,
        )
        missing = find_missing(tokenizer, conversation, turns, thinking)
        return row._replace(lost=missing.lost, left_out=missing.left_out)

    return encode


def pick_rows(
    sources: Sequence[Source], sizes: Sequence[int], max_samples: int | None, seed: int
) -> list[Sequence[int]]:
    """The indices of the records used of each source, ascending: of num_samples drawn, the first max_samples."""
    picked: list[Sequence[int]] = []
    for source, size in zip(sources, sizes, strict=True):
        indices = _slice_of(source, size)
        if source.num_samples is not None:
            if source.num_samples > len(indices):
                # LLaMA-Factory repeats rows here; a row number could then no longer tell them apart.
                raise UsageError(
                    f"dataset {source.name!r}: num_samples is {source.num_samples}, "
                    f"but it has {len(indices)} rows; lower it"
                )
            drawn = random.Random(f"{seed}/{source.name}").sample(indices, source.num_samples)
            indices = sorted(drawn[:max_samples])
        picked.append(indices[:max_samples])
    return picked


def hold_out(indices: Sequence[Sequence[int]], val_size: float, seed: int, split: str) -> list[list[int]]:
    """The part of the rows that `split` has where validation rows are held out: those LLaMA-Factory draws.

    Args:
        indices: the rows used of each dataset.
        val_size: a share of all rows, or a number of rows from 1 on.
    """
    import datasets

    pool = [(number, index) for number, wanted in enumerate(indices) for index in wanted]
    size = int(val_size) if val_size >= 1 else val_size
    try:
        parts = datasets.Dataset.from_dict({"index": range(len(pool))}).train_test_split(test_size=size, seed=seed)
    except ValueError:
        raise UsageError(
            f"val_size is {val_size}, but there are {len(pool)} rows; lower it, or name eval_dataset"
        ) from None
    taken: list[list[int]] = [[] for _ in indices]
    for drawn in sorted(parts["test" if split == "eval" else "train"]["index"]):
        number, index = pool[drawn]
        taken[number].append(index)
    return taken


def _slice_of(source: Source, size: int) -> Sequence[int]:
    """The indices of the records that the entry's `split` names; the hub has cut its own datasets already."""
    if source.split == "train" or source.hub is not None:
        return range(size)
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute({"train": size})
    except ValueError as error:
        raise UsageError(f"dataset {source.name!r}: split {source.split!r} is not of its file ({error})") from None
    return sorted({index for part in parts for index in range(size)[part.from_ : part.to]})


def _key_of(config: RunConfig, split: str) -> str:
    return "eval_dataset" if split == "eval" and not config.val_size else "dataset"


def _template(config: RunConfig) -> Template | None:
    return find_template(config.template) if config.template is not None else None


def _template_text(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The wording of the turns: the template of the table, or the text of the tokenizer's chat template."""
    template = _template(config)
    return repr(template) if template else str(tokenizer.chat_template)


def _is_dated(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template tells the date."""
    template = _template(config)
    return template.tool_format == "llama3" if template else "strftime_now" in str(tokenizer.chat_template)


def _shortened(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` with every long text replaced by its hash, short enough to be kept beside a result."""
    return {
        name: hashlib.sha256(str(value).encode()).hexdigest() if len(str(value)) > 80 else value
        for name, value in facts.items()
    }


def _layout(source: Source) -> str:
    """The parts of a dataset_info.json entry that decide the rows."""
    return repr((source.formatting, source.columns, source.tags, source.num_samples, source.split, source.hub))


def _cut_by_max_samples(config: RunConfig, split: str, sources: Sequence[Source]) -> Iterator[str]:
    """A sentence for each dataset of the validation data that max_samples cuts."""
    if split != "eval" or config.val_size or config.max_samples is None:
        return
    for source in sources:
        size = source.num_samples or len(_slice_of(source, count_records(source)))
        if size > config.max_samples:
            taken = f"{config.max_samples} of {size} rows of {source.name!r}"
            yield f"{told_name(config, split)}: max_samples takes {taken}; raise it to use them all"


def _nothing_left(key: str, names: Sequence[str], report: Report) -> str:
    reasons = [f"  {problem}" for problem in report.problems()]
    return "\n".join([f"{key} {', '.join(names)}: none of {report.seen} rows can be used", *reasons])

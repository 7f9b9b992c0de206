"""README.md beside an adapter and in a merged model: what it was made from, on which data, how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import TrainerCallback

from dataflex.config import MARKS, ROW_KEYS, RunConfig, needed, values_of
from dataflex.distribution import own_version
from dataflex.files import make_ordinary, write_text
from dataflex.keys import Decides, select_keys
from dataflex.masking import masked
from dataflex.provenance import FILE_NAME

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

CARD = "README.md"
MADE_BY = "Made by dataflex"

DATA = tuple(key for key in ROW_KEYS if key not in ("dataset_dir", "split"))
SELECTION = select_keys(
    MARKS,
    lambda mark: "dynamic" in mark.users and mark.decides in (Decides.DIRECTION, Decides.PROJECTION, Decides.SCORES),
)
SETTINGS = select_keys(MARKS, lambda mark: mark.compared and mark.decides in (Decides.TRAINING, Decides.MODEL))


class SavedAdapters(TrainerCallback):
    """Describes each checkpoint of a run as `describe_adapter` does."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            describe_adapter(self.config, Path(needed(args.output_dir)) / f"checkpoint-{state.global_step}")


def describe_adapter(config: RunConfig, folder: Path) -> None:
    """Put a model card in `folder`, where an adapter was saved, and let its files have the umask's mode."""
    write_text(folder / CARD, adapter_card(config, folder))
    make_ordinary(*(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")))


def adapter_card(config: RunConfig, folder: Path) -> str:
    """The model card of an adapter that a run with `config` saved in `folder`."""
    base = config.model_name_or_path or ""
    about = {"model_name_or_path": base, "model_revision": config.model_revision}
    if config.folded_adapters:
        about["adapters folded into it"] = ", ".join(config.folded_adapters)
    if config.resumed_adapter:
        about["adapter it goes on from"] = config.resumed_adapter
    selection = "Every row of the data is trained on, in random order."
    if _command(Path(config.output_dir or folder)) == "dynamic":
        selection = "Rows were selected while it trained (selections/ says which).\n\n" + _listed(config, SELECTION)
    return "\n".join(
        [
            _head(base, "peft", ["lora"]),
            f"# {folder.resolve().name}\n",
            f"A LoRA adapter. {MADE_BY} {own_version()}.\n",
            f"## Base\n\n{_lines(about)}\n",
            f"## Data\n\n{_listed(config, DATA)}\n",
            f"## Selection\n\n{selection}\n",
            f"## Settings\n\n{_listed(config, SETTINGS)}\n",
        ]
    )


def merged_card(config: RunConfig, difference: str) -> str:
    """The model card of `config`'s base model with its adapters merged in; `difference` is what was checked."""
    base = config.model_name_or_path or ""
    adapters = config.adapter_name_or_path or []
    about = {"model_name_or_path": base, "adapters, in order": ", ".join(adapters), "template": config.template}
    parts = [
        _head(base, "transformers", []),
        f"# {Path(config.export_dir or '').name}\n",
        f"A base model with LoRA adapters merged in. {MADE_BY} {own_version()}.\n",
        f"## Base\n\n{_lines(about)}\n",
        f"## Check\n\nRead back after writing, its {difference}.\n",
    ]
    return "\n".join(parts + [_quoted(Path(adapter)) for adapter in adapters])


def _quoted(adapter: Path) -> str:
    """An adapter's own card, where dataflex wrote one, a heading deeper."""
    card = adapter / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if MADE_BY not in text:
        return f"## Adapter {adapter}\n\nIt brought no card that says its data and settings.\n"
    body = text[text.index(MADE_BY) :].partition("\n")[2].lstrip()
    return f"## Adapter {adapter}\n\n" + body.replace("\n## ", "\n### ").replace("## ", "### ", 1)


def _head(base: str, library: str, tags: list[str]) -> str:
    """What the hub reads."""
    facts = {
        "base_model": masked(base),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [*tags, "dataflex"],
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---\n"


def _listed(config: RunConfig, keys: tuple[str, ...]) -> str:
    return _lines({**values_of(config, keys), **({"rows_per_step": config.rows_per_step} if keys is SETTINGS else {})})


def _lines(facts: dict[str, Any]) -> str:
    """A line for each fact that says something."""
    known = {key: value for key, value in masked(facts).items() if value not in (None, "", False)}
    return "\n".join(f"- {key}: {_text(value)}" for key, value in known.items())


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _command(output_dir: Path) -> str | None:
    """The command whose run is under way in `output_dir`."""
    try:
        return json.loads((output_dir / FILE_NAME).read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return None

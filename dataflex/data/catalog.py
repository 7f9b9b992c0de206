"""From the names in `dataset`, `eval_dataset` or `data` to Sources.

A name is an entry of `<dataset_dir>/dataset_info.json`, or a data file. An entry follows
LLaMA-Factory's rules: `columns`, once given, unsets every column it does not list, and so do `tags`;
a hub's address goes before a file's name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataflex.data.conversations import CHAT_TAGS, SHAREGPT_TAGS
from dataflex.data.hub import HubDataset
from dataflex.data.records import SUFFIXES, Columns, Source, Tags, check_columns, files_of, first_record, iter_records
from dataflex.errors import UsageError
from dataflex.named import suggestion

INFO_FILE = "dataset_info.json"
MOST_NAMED = 12  # datasets in an error
FORMATTINGS = ("alpaca", "sharegpt", "openai")

# A file given directly is recognised by the first of these fields its first record has.
DIRECT_LAYOUTS = {
    "messages": (
        "messages",
        Columns(prompt=None, query=None, response=None, messages="messages", system="system", tools="tools"),
        CHAT_TAGS,
    ),
    "conversations": (
        "sharegpt",
        Columns(prompt=None, query=None, response=None, system="system", tools="tools"),
        SHAREGPT_TAGS,
    ),
    "instruction": ("alpaca", Columns(history="history", messages=None, system="system"), SHAREGPT_TAGS),
}

_OTHER_STAGES = {
    "images": "images need a multi-modal model",
    "videos": "videos need a multi-modal model",
    "audios": "audio needs a multi-modal model",
    "chosen": "preference pairs are not for supervised fine-tuning",
    "rejected": "preference pairs are not for supervised fine-tuning",
    "kto_tag": "KTO labels are not for supervised fine-tuning",
}


_OTHER_HUBS = {
    "ms_hub_url": "ModelScope's hub",
    "om_hub_url": "openMind's hub",
    "script_url": "datasets no longer runs scripts",
    "cloud_file_name": "cloud storage",
}


def find_sources(names: Sequence[str], dataset_dir: str | Path) -> list[Source]:
    """The Source behind each name, in order.

    Raises:
        UsageError: a name that is neither an entry nor a file, an entry that cannot be used, a missing file.
    """
    folder = Path(dataset_dir)
    info = {} if all(_is_file(name) for name in names) else _read_info(folder)
    return [_from_entry(name, info[name], folder) if name in info else _from_file(name, info, folder) for name in names]


def recognise(name: str, path: Path, record: dict[str, Any] | None) -> Source:
    """The Source of a file whose first record is `record`."""
    for key, (formatting, columns, tags) in DIRECT_LAYOUTS.items():
        if record is not None and key in record:
            return Source(name, path, formatting, columns, tags)
    found = "it is empty" if record is None else f"its first record has {', '.join(map(str, record)) or 'no fields'}"
    raise UsageError(
        f"data file {path}: {found}; expected a field named messages, conversations or instruction. "
        f"For other names, describe the file in {INFO_FILE} and name that entry"
    )


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES and Path(name).is_file()


def _from_file(name: str, info: dict[str, Any], folder: Path) -> Source:
    path = Path(name)
    if _is_file(name):
        return recognise(name, path, first_record(path))
    if path.is_file():
        raise UsageError(f"data file {path}: unknown kind {path.suffix!r}; expected {', '.join(SUFFIXES)}")
    if path.suffix.lower() in SUFFIXES or os.sep in name:
        raise UsageError(f"dataset {name!r}: no such file, and no entry of that name in {folder / INFO_FILE}")
    raise UsageError(
        f"dataset {name!r} is not in {folder / INFO_FILE}: {_entries(info, folder)}; "
        f"a file ({', '.join(SUFFIXES)}) can be named as well{suggestion(name, info)}"
    )


def _entries(info: dict[str, Any], folder: Path) -> str:
    """How many entries there are, and the names of those whose files are there: LLaMA-Factory's own list has 104."""
    there = [
        name
        for name, entry in info.items()
        if isinstance(entry, dict)
        and isinstance(entry.get("file_name"), str)
        and (folder / entry["file_name"]).exists()
    ]
    shown = ", ".join(there[:MOST_NAMED]) + (", …" if len(there) > MOST_NAMED else "")
    return f"it has {len(info)} {'entry' if len(info) == 1 else 'entries'}" + (
        f", and the files of {shown}" if there else ""
    )


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO_FILE
    if not folder.is_dir():
        raise UsageError(f"dataset_dir {folder}: no such folder; set dataset_dir to the one that holds {INFO_FILE}")
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror or error}; set dataset_dir to the folder that holds it, or name data files"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(info, dict):
        raise UsageError(f"{path}: expected an object of datasets by name, found {type(info).__name__}")
    return info


def _from_entry(name: str, entry: Any, folder: Path) -> Source:
    where = f"{folder / INFO_FILE}, dataset {name!r}"
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: expected an object, found {type(entry).__name__}")
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in FORMATTINGS:
        raise UsageError(f"{where}: formatting {formatting!r} is unknown; expected {', '.join(FORMATTINGS)}")
    if entry.get("ranking"):
        raise UsageError(f"{where}: ranking data is not for supervised fine-tuning; name another dataset")
    num_samples = entry.get("num_samples")
    if num_samples is not None and (type(num_samples) is not int or num_samples < 1):
        raise UsageError(f"{where}: num_samples is {num_samples!r}; expected a positive whole number")
    columns = _columns(entry, where)
    if formatting != "alpaca" and columns.messages is None:
        raise UsageError(f"{where}: columns leave out messages; name the column that holds the turns")
    tags = _tags(entry, where)
    if formatting != "alpaca" and None in (tags.role, tags.content, tags.user, tags.assistant):
        raise UsageError(f"{where}: tags must give role_tag, content_tag, user_tag and assistant_tag")
    split = _optional_text(entry, "split", where) or "train"
    hub = _hub_dataset(entry, where)
    path = _entry_path(entry, where, folder) if hub is None else None
    named = where if "columns" in entry else None
    source = Source(name, path, formatting, columns, tags, num_samples, split, hub, named)
    if hub is not None:
        return source
    if len({path.suffix.lower().replace("jsonl", "json") for path in files_of(source)}) > 1:
        raise UsageError(f"{where}: the files in {source.path} are of several kinds; keep one kind to a folder")
    for path in files_of(source):
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{where}: {path} is of an unknown kind; expected {', '.join(SUFFIXES)}")
    if next(iter_records(source), None) is None:
        raise UsageError(f"{where}: {source.path} is empty; fill it, or name another dataset")
    check_columns(source)
    return source


def _hub_dataset(entry: dict[str, Any], where: str) -> HubDataset | None:
    url = _optional_text(entry, "hf_hub_url", where)
    if url is not None:
        return HubDataset(url, _optional_text(entry, "subset", where), _optional_text(entry, "folder", where))
    for key, hub in _OTHER_HUBS.items():
        if entry.get(key):
            raise UsageError(
                f"{where}: {key} is not supported ({hub}); give hf_hub_url, or download it and give file_name"
            )
    return None


def _optional_text(entry: dict[str, Any], key: str, where: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{where}: {key} is {value!r}; expected a text")
    return value or None


def _entry_path(entry: dict[str, Any], where: str, folder: Path) -> Path:
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise UsageError(f"{where}: file_name is missing; give it, a file or a folder in {folder}, or hf_hub_url")
    path = folder / file_name
    if not Path(file_name).is_absolute() and not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{where}: file_name {file_name!r} leads out of {folder}; give an absolute path")
    if not path.exists():
        raise UsageError(f"{where}: no file {path}")
    return path


def _columns(entry: dict[str, Any], where: str) -> Columns:
    given = _names(entry, "columns", where)
    for key, reason in _OTHER_STAGES.items():
        if given.get(key):
            raise UsageError(f"{where}: column {key!r} is not supported ({reason}); name another dataset")
    if "columns" not in entry:
        return Columns()
    return Columns(**{item.name: given.get(item.name) for item in fields(Columns)})


def _tags(entry: dict[str, Any], where: str) -> Tags:
    given = _names(entry, "tags", where)
    if "tags" not in entry:
        return Tags()
    return Tags(**{item.name: given.get(f"{item.name}_tag") for item in fields(Tags)})


def _names(entry: dict[str, Any], key: str, where: str) -> dict[str, str | None]:
    given = entry.get(key, {})
    if not isinstance(given, dict) or any(not isinstance(v, str | None) for v in given.values()):
        raise UsageError(f"{where}: {key} should map LLaMA-Factory's names to texts")
    return {name: value or None for name, value in given.items()}

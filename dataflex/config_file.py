"""From a YAML, its components file and `key=value` overrides to a checked RunConfig.

Precedence: override over YAML over the component's parameters over the defaults. Every problem is
found before any is reported.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dataflex.config import COMPONENT_KEYS, INPUT_KEYS, PATH_KEYS, RunConfig
from dataflex.errors import UsageError
from dataflex.named import suggestion
from dataflex.peer_keys import NEUTRAL, PEER_KEYS, PEER_PARAMS, REFUSED_KEYS, RENAMED_KEYS
from dataflex.selectors import table as selectors
from dataflex.trainer_keys import TrainerKeys


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without silent duplicates: the second of two equal keys would win unseen."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        if isinstance(key, str):
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), options: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read `path` (none: defaults alone), apply `options`, then `overrides`, and check everything at once.

    Args:
        path: a YAML file with LLaMA-Factory's or DataFlex's keys.
        overrides: `"key=value"` texts, the value read as YAML.
        options: values by key; they win over the YAML, `overrides` win over them.

    Raises:
        UsageError: naming each missing file, malformed line, unknown key and wrong value.
    """
    problems: list[str] = []
    where = f"config {path}" if path is not None else "config"
    values = read_yaml_mapping(path, "config") if path is not None else {}
    _rename(values, problems)
    folder = Path(path).parent if path is not None else None
    arguments: set[str] = set()
    for given in (dict(options or {}), _read_overrides(overrides, problems)):
        arguments |= given.keys()
        _rename(given, problems)
        further = given.get("training_arguments")
        arguments |= given.keys() | (further.keys() if isinstance(further, dict) else set())
        values.update(given)

    for key, reason in REFUSED_KEYS.items():
        value = values.pop(key, None)
        if value and value != NEUTRAL.get(key):
            problems.append(f"key {key!r}: not supported, {reason}; remove it")
    _gather_trainer_keys(values)
    known = [*RunConfig.model_fields, *TrainerKeys.__annotations__]
    unused = _drop_peer_keys(values, known, PEER_KEYS, "key", problems)
    _expand_paths(values, problems)
    if folder is not None:
        for key in INPUT_KEYS:
            if values.get(key) is not None:
                values[key] = _locate(values[key], folder)
        default_dir = RunConfig.model_fields["dataset_dir"].default
        if "dataset_dir" not in values and not os.path.exists(default_dir) and os.path.exists(folder / default_dir):
            values["dataset_dir"] = str(folder / default_dir)

    defaults, unused_params = _component(values, problems)
    _expand_paths(defaults, problems)
    values = {**defaults, **values}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += _describe(error)
        # keys are checked against each other only once each is right: leave the wrong ones out and look again
        wrong = {item["loc"][0] for item in error.errors() if item["loc"]}
        if wrong:
            try:
                RunConfig.model_validate({key: value for key, value in values.items() if key not in wrong})
            except ValidationError as further:
                problems += _describe(further)
    deepspeed = values.get("deepspeed")
    if isinstance(deepspeed, str) and not os.path.isfile(deepspeed):
        problems.append(f"key 'deepspeed': no file {deepspeed}")
    if problems:
        raise UsageError(_told(problems, where, arguments))
    if unused or unused_params:
        warnings.warn(f"{where}: keys without effect here: {', '.join(unused + unused_params)}", stacklevel=2)
    return config


def read_yaml_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping a YAML file holds; a UsageError names the file and the line otherwise."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{what} {path}: not UTF-8 text; a YAML file is expected") from None
    except ValueError as error:
        raise UsageError(f"{what} {path!r}: no file can have this name ({error})") from None
    try:
        values = yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{what} {path}{line}: not valid YAML ({reason})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{what} {path}: expected lines of `key: value`, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _read_overrides(overrides: Iterable[str], problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            problems.append(f"argument {text!r}: expected key=value")
            continue
        try:
            values[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            values[key.strip()] = value  # a text that YAML cannot read is still a text
    return values


def _rename(values: dict[str, Any], problems: list[str]) -> None:
    """Put former names of keys under the present ones."""
    for old, new in RENAMED_KEYS.items():
        if old in values and new in values:
            problems.append(f"key {old!r}: the former name of {new!r}, which is there too; keep one")
        if old in values:
            values.setdefault(new, values[old])
            del values[old]


def _gather_trainer_keys(values: dict[str, Any]) -> None:
    """Move the keys that TrainingArguments takes as they stand under RunConfig's one key for them."""
    found = {key: values.pop(key) for key in TrainerKeys.__annotations__ if key in values}
    further = values.get("training_arguments", {})
    if found and isinstance(further, dict):
        values["training_arguments"] = {**further, **found}
    if isinstance(values.get("training_arguments"), dict):
        given = values["training_arguments"].items()
        values["training_arguments"] = {key: value for key, value in given if value is not None}


def _drop_peer_keys(
    values: dict[str, Any], known: Iterable[str], peer: frozenset[str], noun: str, problems: list[str]
) -> list[str]:
    """Take out what is not ours: returns the peers' keys, notes any other as a problem."""
    unknown = [key for key in values if key not in known]
    unused = sorted(key for key in unknown if key in peer)
    for key in unknown:
        del values[key]
        if key not in peer:
            problems.append(f"{noun} {key!r}: unknown{suggestion(key, known)}")
    return unused


def _expand_paths(values: dict[str, Any], problems: list[str]) -> None:
    """Put the home folder for `~` and a variable's value for `$NAME` in every key that names a path."""
    for key in PATH_KEYS:
        if key in values:
            values[key] = _expanded(values[key], key, problems)


def _expanded(value: Any, key: str, problems: list[str]) -> Any:
    if isinstance(value, list):
        return [_expanded(item, key, problems) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or os.path.exists(value):  # a file may be called so
        return value
    expanded = ",".join(os.path.expanduser(os.path.expandvars(part.strip())) for part in value.split(","))
    unset = re.search(r"\$(\w+|\{[^}]*\})", expanded)
    if unset:
        problems.append(f"key {key!r}: the environment has no variable {unset.group().strip('${}')}, in {value!r}")
    return expanded if "~" in value or "$" in value else value


def _locate(value: Any, folder: Path) -> Any:
    """A relative path that only exists beside the YAML becomes a path that leads there."""
    if isinstance(value, list):
        return [_locate(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    if "," in value:
        return ",".join(_locate(part.strip(), folder) for part in value.split(","))
    if value and not os.path.exists(value) and os.path.exists(folder / value):
        return str(folder / value)
    return value


def _component(
    values: dict[str, Any], problems: list[str], or_packaged: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """What `component_name` stands for under RunConfig's keys, and its parameters without effect here.

    `or_packaged`: a name that the components file does not have may be that of a packaged component.
    """
    name = values.get("component_name", "less")
    path = values.get("components_cfg_file")
    if not isinstance(name, str) or not isinstance(path, str | None):
        return {}, []  # told with the other wrong values
    if path is None:
        components, where = selectors.packaged_components(), "the packaged components"
    else:
        where = f"components file {path}"
        try:
            components = read_yaml_mapping(path, "components file")
        except UsageError as error:
            problems.append(str(error))
            return {}, []
        if isinstance(components.get("selectors"), dict):
            components = components["selectors"]
        if or_packaged and name not in components and name in selectors.packaged_components():
            components = selectors.packaged_components()
    if name not in components and (path is None or ":" in name):
        return _selector(name, "key 'component_name'", problems), []
    if name not in components:
        choices = ", ".join(str(key) for key in components) or "none"
        problems.append(
            f"key 'component_name': no {name!r} in {where}; it has {choices}{suggestion(name, map(str, components))}"
        )
        return {}, []
    component = components[name]
    if not isinstance(component, dict) or not isinstance(component.get("params") or {}, dict):
        problems.append(f"{where}: {name!r} should hold `name:` and `params:`")
        return {}, []
    params = dict(component.get("params") or {})
    if "seed" in params:
        params["proj_seed"] = params.pop("seed")
    unused = _drop_peer_keys(params, COMPONENT_KEYS, PEER_PARAMS, f"{where}, {name!r}: parameter", problems)
    return {**params, **_selector(component.get("name", name), f"{where}, {name!r}", problems)}, unused


def with_component(config: RunConfig, name: str) -> RunConfig:
    """`config` with the selector and the parameters of the component `name`, in place of those of `component_name`.

    Keys that the configuration sets to other values than its own component does win over the parameters.

    Raises:
        UsageError: where there is no such component.
    """
    problems: list[str] = []
    values = config.model_dump(exclude_unset=True)
    own, _ = _component(values, problems)
    kept = {key: value for key, value in values.items() if key not in own or own[key] != value}
    kept.pop("selector", None)
    params, _ = _component({**kept, "component_name": name}, problems, or_packaged=True)
    _expand_paths(params, problems)
    if problems:
        raise UsageError(problems[-1].replace("key 'component_name'", "key 'selectors'"))
    return RunConfig.model_validate({**params, **kept, "component_name": name})


def _selector(name: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """The key `selector`, or none and a problem where nothing bears the name."""
    try:
        return {"selector": selectors.check_name(name) if isinstance(name, str) else name}
    except UsageError as error:
        problems.append(f"{where}: {error}")
        return {}


def _told(problems: Sequence[str], where: str, arguments: Collection[str]) -> str:
    """All problems under `where` they are: in the file, among the keys that were given as `arguments`, or in both where
    several keys do not go together."""
    keys = [re.match(r"key '([^']+)'|argument", problem) for problem in problems]
    given = [key is not None and (key[1] is None or key[1] in arguments) for key in keys]
    if all(given):
        where = "arguments"
    else:
        where = f"{where} and arguments" if arguments and None in keys else where
        problems = [f"{text} (an argument)" if own else text for text, own in zip(problems, given, strict=True)]
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return f"{where}: {len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in problems)


def _describe(error: ValidationError) -> list[str]:
    """What pydantic found, a line each."""
    lines = []
    for item in error.errors():
        path = item["loc"][1:] if item["loc"][:1] == ("training_arguments",) and item["loc"][1:] else item["loc"]
        key, message = ".".join(map(str, path)), item["msg"].removeprefix("Value error, ")
        if not key:
            lines += message.splitlines()
            continue
        given = repr(item["input"])
        given = given if len(given) < 80 else f"{given[:77]}..."
        found = "" if isinstance(item["input"], str) and given in message else f", not {given}"
        lines.append(f"key {key!r}: {message[0].lower()}{message[1:]}{found}")
    return lines

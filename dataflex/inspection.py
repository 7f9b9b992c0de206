"""What a path or a dataset's name stands for, and whether it is whole: the `inspect` command."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dataflex.config import RunConfig
from dataflex.data.catalog import find_sources
from dataflex.data.conversations import Unusable, to_conversation
from dataflex.data.preprocess import subtask_of
from dataflex.data.preview import first_row, summary
from dataflex.data.records import Source, files_of, iter_records
from dataflex.data.report import Report
from dataflex.errors import UsageError
from dataflex.files import read_jsonl
from dataflex.progress import SILENT, Progress
from dataflex.reporting.facts import NUMBERS

ADAPTER, ADAPTER_CONFIG, MOMENTS, RUN = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "moments.safetensors",
    "run.json",
)
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(repr=False)
class Inspection:
    """The findings."""

    kind: str
    """store, scores, subset, dataset, checkpoint, output directory or comparison."""
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Why it is not whole, a phrase each."""
    data: dict[str, Any] | None = None
    """Of a dataset and a tokenizer: the rows in numbers, as `preview.summary` gives them."""
    example: dict[str, Any] | None = None
    """Of the same: the first row kept, as `row`, `dataset` and `spans`."""

    @property
    def whole(self) -> bool:
        return not self.problems

    def __repr__(self) -> str:
        """A line for each finding, and the first row with what is learned in brackets."""
        lines = [f"{self.kind} {self.name}: {'whole' if self.whole else 'not whole'}"]
        lines += [f"  {key.replace('_', ' ')}: {value}" for key, value in {**self.facts, **(self.data or {})}.items()]
        lines += [f"  problem: {problem}" for problem in self.problems]
        if self.example is not None:
            spans = (f"⟦{span['text']}⟧" if span["supervised"] else span["text"] for span in self.example["spans"])
            lines += [f"row {self.example['row']} of {self.example['dataset']}; ⟦…⟧ is learned", "".join(spans)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without what was not looked for."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return {"kind": values.pop("kind"), "name": values.pop("name"), "whole": self.whole, **values}


def inspect(
    target: str | Path, config: RunConfig | None = None, progress: Progress = SILENT, keep: bool = True
) -> Inspection:
    """Say what `target` is: a path, or names in `dataset_dir`'s dataset_info.json by comma.

    Datasets are encoded as a run with `config` would where it names a model; else their records are read. `keep`
    as for `load_split`.

    Raises:
        UsageError: there is nothing of that name, it is of no kind known here, or it cannot be read.
    """
    path, target, config = Path(target), str(target), config or RunConfig()
    if path.is_dir():
        return _inspect_folder(path)
    if path.is_file():
        if path.suffix.lower() in (".h5", ".hdf5") or _starts_with(path, HDF5_SIGNATURE):
            return _inspect_store(path)
        if path.suffix.lower() == ".jsonl":
            first = next(read_jsonl(path, "file"), {})
            if "row" in first and "score" in first:
                return _inspect_scores(path, first)
            if isinstance(first.get("dataflex"), dict):
                return _inspect_subset(config, path, progress, keep)
    return _inspect_dataset(config, target, progress, keep)


def _starts_with(path: Path, signature: bytes) -> bool:
    try:
        with open(path, "rb") as handle:
            return handle.read(len(signature)) == signature
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None


def _inspect_store(path: Path) -> Inspection:
    from dataflex.store.reader import GradientStore

    with GradientStore(path) as store:
        done = store.done.astype(bool)
        facts = {
            "rows": len(store),
            "done": int(done.sum()),
            "dimensions": store.dim,
            "bytes": path.stat().st_size,
            **store.manifest.summary(),
        }
        if store.subtask is not None:
            facts["subtasks"] = sorted(set(store.subtask) - {""})
        bad = store.bad
        if bad.any():
            facts["skipped"] = int(bad.sum())
        if (done & ~bad).any():
            facts["mean_loss"] = float(store.loss[done & ~bad].mean())
        missing, damaged = store.row[~done], store.damaged_rows()
    problems = [f"{len(missing)} of {len(done)} rows are not done (first: row {missing[0]})"] if len(missing) else []
    if damaged:
        problems.append(f"{len(damaged)} rows are not as they were written (first: row {damaged[0]})")
    if not store.sound:
        problems.append("its manifest or its rows do not have the checksum they were written with")
    return Inspection("store", str(path), facts, problems)


def _inspect_scores(path: Path, first: dict[str, Any]) -> Inspection:
    from dataflex.influence.score_file import read_scores
    from dataflex.influence.scores import winners
    from dataflex.influence.sidecar import read_manifest

    scores = read_scores(path)
    facts = {
        "rows": len(scores.row),
        "rows_from": int(scores.row.min()),
        "rows_to": int(scores.row.max()),
        "score_max": float(scores.score.max()),
        "score_mean": float(scores.score.mean()),
        "score_min": float(scores.score.min()),
        "subtasks": list(first.get("subtasks") or {}),
    }
    manifest = read_manifest(path, len(scores.row), SILENT) or {}
    facts |= {key: manifest[key] for key in ("length_correlation", "projection_correlation") if key in manifest}
    if len(scores.subtasks) > 1:
        facts["winners"] = {
            name: {"rows": count, "best_row": int(scores.row[best]), "best": float(scores.subtasks[name][best])}
            for name, (count, best) in winners(scores).items()
        }
    if scores.dataset is not None:
        facts["datasets"] = {name: scores.dataset.count(name) for name in dict.fromkeys(scores.dataset)}
    return Inspection("scores", str(path), facts)


def _inspect_subset(config: RunConfig, path: Path, progress: Progress, keep: bool) -> Inspection:
    found = _inspect_dataset(config, str(path), progress, keep)
    scores = [origin["score"] for origin in _origins(path)]
    found.kind = "subset"
    found.facts |= {"selected": len(scores), "score_max": max(scores), "score_min": min(scores)}
    return found


def _origins(path: Path) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(read_jsonl(path, "subset"), start=1):
        origin = record.get("dataflex")
        if not isinstance(origin, dict) or not isinstance(origin.get("score"), float | int):
            raise UsageError(f"subset {path}, record {number}: no dataflex.score; the other records have one")
        yield origin


def _inspect_dataset(config: RunConfig, target: str, progress: Progress, keep: bool) -> Inspection:
    config = config.changed(dataset=target, eval_dataset=None, val_size=0.0)
    sources = find_sources(config.dataset or [], config.dataset_dir)
    facts: dict[str, Any] = {
        "formatting": sorted({source.formatting for source in sources}),
        "files": [str(path) for source in sources for path in _locations(source)],
    }
    if config.model_name_or_path is None:
        report = _read_only(sources)
        facts["rows"] = report.seen
        facts["dropped"] = {reason: len(rows) for reason, rows in report.dropped.items()}
        facts["left_out"] = {what: len(rows) for what, rows in report.left_out.items()}
        return Inspection("dataset", target, facts, report.problems())

    from dataflex.data.examples import load_split
    from dataflex.model import load_tokenizer

    tokenizer = load_tokenizer(config)
    split = load_split(config, tokenizer, "train", progress, keep)
    facts |= {"template": config.template or "the tokenizer's own", "cutoff_len": config.cutoff_len}
    problems = split.report.problems()
    example = first_row(split.examples, tokenizer)
    return Inspection("dataset", target, facts, problems, summary(split.report), example)


def _locations(source: Source) -> Sequence[object]:
    return files_of(source) if source.hub is None else [source.hub.path]


def _read_only(sources: Sequence[Source]) -> Report:
    """Rows, those that hold no conversation, and what of them is not read; what a template makes is another matter."""
    report = Report()
    for source in sources:
        for record in iter_records(source):
            subtask_of(source, record, report.seen)
            try:
                for what in to_conversation(source, record).left_out:
                    report.left_out.setdefault(what, []).append(report.seen)
            except Unusable as reason:
                report.dropped.setdefault(str(reason), []).append(report.seen)
            report.seen += 1
    return report


def _inspect_folder(path: Path) -> Inspection:
    checkpoints = sorted(path.glob("checkpoint-*"), key=_step_of)
    if (path / RUN).exists() or checkpoints:
        return _inspect_output(path, checkpoints)
    if (path / ADAPTER).exists() or (path / MOMENTS).exists() or path.name.startswith("checkpoint-"):
        return _inspect_checkpoint(path)
    raise UsageError(
        f"{path}: neither a checkpoint ({ADAPTER}) nor an output directory ({RUN} or checkpoint-*); "
        "name one, or a store, scores, a subset or a dataset"
    )


def _inspect_checkpoint(path: Path) -> Inspection:
    found = Inspection("checkpoint", str(path))
    settings = _read_json(path / ADAPTER_CONFIG, found)
    for key in ("base_model_name_or_path", "r", "lora_alpha", "target_modules"):
        if key in settings:
            found.facts[key] = sorted(map(str, settings[key])) if isinstance(settings[key], list) else settings[key]
    adapter, _ = _read_header(path / ADAPTER, found)
    if adapter:
        found.facts |= {"tensors": len(adapter), "parameters": sum(adapter.values())}
    moments, numbers = _read_header(path / MOMENTS, found, "gradients of type adam need it")
    for key, value in numbers.items():
        try:
            found.facts[key] = json.loads(value)
        except ValueError:
            found.problems.append(f"{MOMENTS} holds {value!r} for {key}; expected a number")
    expected = {f"{kind}/{name}": size for name, size in adapter.items() for kind in ("exp_avg", "exp_avg_sq")}
    if adapter and moments and moments != expected:
        found.problems.append(f"{MOMENTS} is of another adapter than {ADAPTER}")
    return found


def _inspect_output(path: Path, checkpoints: Sequence[Path]) -> Inspection:
    found = Inspection("output directory", str(path))
    record = _read_json(path / RUN, found)
    found.facts |= {key: value for key, value in record.items() if key not in ("origin", "losses_of_others")}
    if record and record.get("finished") is False:
        found.problems.append("the run has not ended; the same command goes on from where it is")
    if record.get("command") == "compare":
        return _as_comparison(found, path)
    log = path / "trainer_log.jsonl"
    if log.is_file():
        *_, last = [{}, *(line for line in read_jsonl(log, "log") if "current_steps" in line)]
        found.facts |= {key: last[key] for key in ("current_steps", "total_steps") if key in last}
    found.facts["checkpoints"] = [checkpoint.name for checkpoint in checkpoints]
    selections = sorted((path / "selections").glob("step-*.jsonl"), key=_step_of)
    if selections:
        found.facts["selections_at"] = [_step_of(file) for file in selections]
    for name in (ADAPTER, ADAPTER_CONFIG):
        if record.get("finished") is not False and not (path / name).is_file():
            found.problems.append(f"{name} is missing")
    for checkpoint in checkpoints:
        found.problems += [f"{checkpoint.name}: {problem}" for problem in _inspect_checkpoint(checkpoint).problems]
    return found


def _as_comparison(found: Inspection, path: Path) -> Inspection:
    """What the folder of a comparison holds beside its record."""
    found.kind = "comparison"
    if found.whole:
        figures = _read_json(path / NUMBERS, found)
        found.facts |= {key: figures[key] for key in ("arms", "budgets", "by", "seeds", "verdict") if key in figures}
    return found


def _step_of(path: Path) -> int:
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _read_json(path: Path, found: Inspection) -> dict[str, Any]:
    """The object in a file; {} and a problem where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found.problems.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError) as error:
        found.problems.append(f"{path.name} cannot be read ({error})")
        return {}
    return value if isinstance(value, dict) else {}


def _read_header(path: Path, found: Inspection, why: str = "") -> tuple[dict[str, int], dict[str, str]]:
    """Sizes by tensor and the metadata of a safetensors file; empty, and a problem, where it is missing or cut off."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        found.problems.append(f"{path.name} is missing" + (f"; {why}" if why else ""))
        return {}, {}
    try:
        with safe_open(path, framework="np") as tensors:
            names = tensors.keys()
            return {name: math.prod(tensors.get_slice(name).get_shape()) for name in names}, tensors.metadata() or {}
    except SafetensorError as error:
        found.problems.append(f"{path.name} is not whole ({error})")
        return {}, {}

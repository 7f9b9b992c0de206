"""The numbers of report.json: of a run of `dynamic`, and of a score file."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config import RunConfig, needed
from dataflex.config_file import load_config, read_yaml_mapping
from dataflex.data.catalog import find_sources
from dataflex.errors import UsageError
from dataflex.files import read_jsonl
from dataflex.influence.score_file import read_scores
from dataflex.influence.score_table import read_score_table
from dataflex.influence.sidecar import read_manifest
from dataflex.progress import Progress
from dataflex.provenance import CONFIG_NAME, RunRecord, read_record
from dataflex.reporting.scores import best_and_worst_as_text, figures_of_scores

NUMBERS = "report.json"


def facts_of_run(folder: Path, progress: Progress) -> dict[str, Any]:
    """Of a finished run of `dynamic`: schedule, losses, every selection, rows as text, seconds, settings, origin."""
    record = finished_record(folder)
    run = record.facts
    settings = read_yaml_mapping(folder / CONFIG_NAME, "config")
    selections, picks = [], []
    table = None
    for made in run["selections"]:
        step = made["step"]
        table = read_score_table(folder / "selections" / f"step-{step}.parquet")
        picked = [line["row"] for line in read_jsonl(folder / "selections" / f"step-{step}.jsonl", "selection")]
        picks.append(set(picked))
        scores, tokens = table
        selections.append(
            {
                **made,
                **figures_of_scores(scores, tokens),
                "picked_tokens": float(tokens[np.isin(scores.row, picked)].mean()),
                "pool_tokens": float(tokens.mean()),
            }
        )
    path = folder / "trainer_log.jsonl"
    log = list(read_jsonl(path, "log")) if path.exists() else []  # a run shorter than logging_steps logs nothing
    found: dict[str, Any] = {
        "command": "dynamic",
        "name": str(folder),
        "selector": settings.get("selector", "less"),
        "steps": run["steps"],
        "rows_per_step": run["rows_per_step"],
        "pool": {"rows": run["rows"], "datasets": run["pool"]},
        "loss": [{"step": line["current_steps"], "loss": line["loss"]} for line in log if line.get("loss") is not None],
        "eval_losses": [
            {"step": line["current_steps"], "loss": line["eval_loss"]}
            for line in log
            if line.get("eval_loss") is not None
        ],
        "eval_loss": {"rows": run["eval_rows"], **run["eval_loss"]},
        "others": run.get("others"),
        "selections": selections,
        "overlap": [[len(one & other) / max(1, len(one)) for other in picks] for one in picks],
        **_common(record, settings),
    }
    if table is not None:
        scores, tokens = table
        config = load_config(folder / CONFIG_NAME)
        sources = find_sources(needed(config.dataset), config.dataset_dir)
        found |= best_and_worst_as_text(scores, tokens, sources, progress)
    return found


def facts_of_comparison(folder: Path) -> dict[str, Any]:
    """The report.json of a comparison, with its settings and origin."""
    record = finished_record(folder)
    path = folder / NUMBERS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable ({error}); run the comparison again") from None
    return {**found, "name": str(folder), **_common(record, read_yaml_mapping(folder / CONFIG_NAME, "config"))}


def facts_of_scores(path: Path, config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Of a score file and the data it scores: `data`, or `dataset`."""
    scores = read_scores(path)
    names = config.data or config.dataset
    if not names:
        raise UsageError(f"report of {path} needs data, the datasets that were scored; give --data")
    manifest = read_manifest(path, len(scores.row), progress) or {}
    sources = find_sources(names, config.dataset_dir)
    return {
        "command": "score",
        "name": str(path),
        "selector": manifest.get("selector", "less"),
        "pool": {"rows": len(scores.row)},
        "selections": [{**figures_of_scores(scores, None), "length_correlation": manifest.get("length_correlation")}],
        **best_and_worst_as_text(scores, None, sources, progress, files=manifest.get("files")),
        "settings": {key: manifest[key] for key in ("reduce", "normalise", "contrast", "weights") if key in manifest},
        "fingerprints": {"files": manifest.get("files"), **(manifest.get("data") or {})},
    }


def finished_record(folder: Path) -> RunRecord:
    """The record of a run that is finished; a UsageError otherwise."""
    record = read_record(folder)
    if record is None:
        raise UsageError(f"{folder} has no run.json; name a folder that dynamic or compare wrote, or a score file")
    if not record.finished:
        raise UsageError(f"{folder}: the run is not finished; run its command again, and it goes on")
    return record


def _common(record: RunRecord, settings: dict[str, Any]) -> dict[str, Any]:
    facts = record.facts
    return {
        "seconds": facts.get("seconds", {}),
        "device": facts.get("device"),
        "processes": facts.get("processes"),
        "versions": facts.get("versions", {}),
        "settings": {key: str(value) if isinstance(value, date) else value for key, value in settings.items()},
        "fingerprints": facts["origin"]["content"],
    }

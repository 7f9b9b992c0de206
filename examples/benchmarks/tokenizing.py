"""Rows tokenized a second, by workers, beside `datasets.map` with the same tokenizer.

    .venv/bin/python examples/benchmarks/tokenizing.py --rows 40000

The rows are those of alpaca_en_demo and glaive_toolcall_en_demo, repeated. dataflex encodes whole conversations: the
template, the labels, the cut to cutoff_len, and a check that no text is lost. `datasets.map` tokenizes the text of each
record alone, in batches of 1,000.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).resolve().parent.parent.parent
MODEL = str(LIBRARY / "models/SmolLM2-135M-Instruct")
NAMES = ["alpaca_en_demo", "glaive_toolcall_en_demo"]


def records_of(name: str, rows: int) -> list[dict[str, Any]]:
    """The records of a dataset, repeated to `rows`."""
    source: list[dict[str, Any]] = json.loads((LIBRARY / "data" / f"{name}.json").read_text(encoding="utf-8"))
    return (source * (rows // len(source) + 1))[:rows]


def seconds_of_ours(path: Path, workers: int) -> float:
    import dataflex
    from dataflex.data.examples import load_split
    from dataflex.model import load_tokenizer

    options = {"model_name_or_path": MODEL, "template": "smollm2", "dataset": [str(path)]}
    config = dataflex.load_config(options={**options, "preprocessing_num_workers": workers, "overwrite_cache": True})
    tokenizer = load_tokenizer(config)
    started = time.perf_counter()
    load_split(config, tokenizer)
    return time.perf_counter() - started


def seconds_of_map(records: list[dict[str, Any]], workers: int) -> float:
    import datasets
    from transformers import AutoTokenizer

    texts = datasets.Dataset.from_dict({"text": [json.dumps(record, ensure_ascii=False) for record in records]})
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"]).input_ids}

    started = time.perf_counter()
    texts.map(encode, batched=True, num_proc=workers if workers > 1 else None, load_from_cache_file=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000, help="of each of the two datasets")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # before `datasets` is imported
        print("| dataset | workers | dataflex, rows/s | datasets.map, rows/s |\n|---|---|---|---|", flush=True)
        for dataset in NAMES:
            records = records_of(dataset, given.rows)
            path = folder / f"{dataset}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            for workers in given.workers:
                ours, theirs = seconds_of_ours(path, workers), seconds_of_map(records, workers)
                print(f"| {dataset} | {workers} | {given.rows / ours:,.0f} | {given.rows / theirs:,.0f} |", flush=True)


if __name__ == "__main__":
    main()

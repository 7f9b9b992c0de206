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
from collections.abc import Callable
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent.parent.parent
MODEL = str(LIBRARY / "models/SmolLM2-135M-Instruct")
NAMES = ["alpaca_en_demo", "glaive_toolcall_en_demo"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000, help="of each of the two datasets")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # before `datasets` is imported
        import datasets
        from transformers import AutoTokenizer

        import dataflex

        print("| dataset | workers | dataflex, rows/s | datasets.map, rows/s |\n|---|---|---|---|")
        for dataset in NAMES:
            source = json.loads((LIBRARY / "data" / f"{dataset}.json").read_text(encoding="utf-8"))
            records = (source * (given.rows // len(source) + 1))[: given.rows]
            path = folder / f"{dataset}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            tokenizer = AutoTokenizer.from_pretrained(MODEL)
            texts = datasets.Dataset.from_dict({"text": [json.dumps(r, ensure_ascii=False) for r in records]})

            def encode(batch: dict[str, list[str]], tokenizer=tokenizer) -> dict[str, list[list[int]]]:  # type: ignore[no-untyped-def]
                return {"input_ids": tokenizer(batch["text"]).input_ids}

            for workers in given.workers:
                config = dataflex.load_config(
                    options={
                        "model_name_or_path": MODEL,
                        "template": "smollm2",
                        "dataset": [str(path)],
                        "preprocessing_num_workers": workers,
                        "overwrite_cache": True,
                    }
                )
                ours = _rate(given.rows, lambda config=config: dataflex.load_examples(config))  # type: ignore[misc]
                theirs = _rate(
                    given.rows,
                    lambda texts=texts, workers=workers, encode=encode: texts.map(  # type: ignore[misc]
                        encode, batched=True, num_proc=workers if workers > 1 else None, load_from_cache_file=False
                    ),
                )
                print(f"| {dataset} | {workers} | {ours:,.0f} | {theirs:,.0f} |", flush=True)


def _rate(rows: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return rows / (time.perf_counter() - started)


if __name__ == "__main__":
    main()

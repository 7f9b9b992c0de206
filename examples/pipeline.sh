#!/usr/bin/env bash
# LESS one step at a time, with the files that pass between the steps: bash examples/pipeline.sh
# About 4 minutes on two CPU cores. Needs `make setup`; run it from the repository's root.
set -euo pipefail
PATH="$PWD/.venv/bin:$PATH"
out=saves/pipeline

# 1. a few steps on random rows: where gradients are taken, and Adam's moments there
dataflex warmup examples/pipeline.yaml output_dir=$out/warmup --overwrite

# 2. the step Adam would take on each row of the pool, and the gradient of each row of the target
dataflex grads examples/pipeline.yaml --checkpoint $out/warmup/checkpoint-4 -o $out/train.h5 --overwrite
dataflex grads examples/pipeline.yaml --checkpoint $out/warmup/checkpoint-4 --split eval -o $out/eval.h5 --overwrite

# 3. how well they agree, row by row, and the rows that agree best
dataflex score --train $out/train.h5 --eval $out/eval.h5 -o $out/scores.jsonl --overwrite
dataflex select examples/pipeline.yaml --scores $out/scores.jsonl --top 0.33 -o $out/subset.jsonl --overwrite

# 4. fine-tune on them, fold the adapter into the model, and ask it something
dataflex train examples/pipeline.yaml --dataset $out/subset.jsonl output_dir=$out/adapter --overwrite
dataflex merge examples/pipeline.yaml --adapter $out/adapter --export-dir $out/merged --overwrite
python examples/ask.py $out/merged "What is the capital of France?"

"""`bench` on Llama's shapes: tokens a second, the share of what a matrix product reaches, memory, by size and rank.

    python examples/benchmarks/llama.py                                        # 1B, r = 16 and 128
    python examples/benchmarks/llama.py --shapes 1b 8b --projectors sketch fast_jl      # on a GPU

The weights are random, since none of the figures depends on them, and lie in `--folder` (2.5 GB for 1B, 16 GB for
8B) until it is deleted. The rows are the demo's answers joined and cut at 512 tokens, nearly all of them supervised.
Everything is bfloat16, and LoRA sits on all linear layers. Run it from the repository, after `make setup`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOKENIZER = "models/SmolLM2-135M-Instruct"
TOKENS = 512
ROWS = 128
# of Llama-3.2-1B and Llama-3.1-8B; `tiny` is for trying this script
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
}
HEADINGS = (
    "shape, r, projector",
    "LoRA training, tokens/s",
    "gradients, tokens/s",
    "ratio",
    "share of a matrix product's speed",
    "direction, projection, write",
    "peak memory, training and gradients",
)


def make_model(shape: str, folder: Path) -> Path:
    """A model of random weights in `folder`, unless it is there already."""
    path = folder / f"llama-{shape}"
    if path.exists():
        return path
    config = LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    unfinished = path.with_name(f"{path.name}.unfinished")
    model.save_pretrained(unfinished, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(unfinished)
    return unfinished.rename(path)


def write_rows(path: Path) -> None:
    answers = [row["output"] for row in json.loads(Path("data/alpaca_en_demo.json").read_text(encoding="utf-8"))]
    texts = [" ".join(answers[start::ROWS]) for start in range(ROWS)]
    rows = [{"instruction": "Go on.", "input": "", "output": (text + " ") * 8} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(model: Path, rows: Path, rank: int, projector: str, token_budget: int | None) -> dict:
    """What `dataflex bench --json` prints."""
    command = [sys.executable, "-m", "dataflex", "bench", "--json", "--model", model, "--dataset", rows]
    command += ["--template", "smollm2", "--cutoff-len", TOKENS, "--projector", projector]
    command += ["bf16=true", "lora_target=all", f"lora_rank={rank}", "proj_dim=8192"]
    if token_budget is not None:
        command += ["--token-budget", token_budget]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def table_row(name: str, found: dict) -> tuple[str, ...]:
    parts, peaks = found["grads"]["seconds"], found["peak_memory_bytes"]
    return (
        name,
        f"{found['train']['tokens_per_s']:.0f}",
        f"{found['grads']['tokens_per_s']:.0f}",
        f"{found['ratio']:.2f}",
        f"{100 * found['grads']['flops_per_s'] / found['matmul_flops_per_s']:.0f}% of "
        f"{found['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s",
        ", ".join(f"{100 * parts[part] / sum(parts.values()):.1f}%" for part in ("direction", "projection", "write")),
        f"{peaks['train'] / 1e9:.1f} GB, {peaks['grads'] / 1e9:.1f} GB",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1b"], choices=SHAPES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--projectors", nargs="+", default=["sketch"])
    parser.add_argument("--token-budget", type=int, help="chosen from the free memory when left out")
    parser.add_argument("--folder", type=Path, default=Path("saves/benchmarks"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = args.folder / "llama-rows.jsonl"
    write_rows(rows)
    device, lines = None, []
    for shape in args.shapes:
        model = make_model(shape, args.folder)
        for rank in args.ranks:
            for projector in args.projectors:
                found = measure(model, rows, rank, projector, args.token_budget)
                device, sample = found["device"], found["sample"]
                lines.append(table_row(f"{shape}, {rank}, {projector}", found))
                print(f"{lines[-1][0]}: {sample['rows']} rows, {sample['tokens']} tokens", file=sys.stderr)
    print(f"{device}, torch {torch.__version__}\n")
    for line in (HEADINGS, ("---",) * len(HEADINGS), *lines):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()

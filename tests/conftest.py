"""What every test may lean on: the repository's folders, the demo model, a tiny model, the command line.

    make test                                        # sets up first
    .venv/bin/python -m pytest tests/test_assets.py  # one file, after `make setup`
    make test-gpu                                    # what a GPU must show, where there is one

Fixtures fail, not skip, where something that `make setup` makes is missing: a test that did not run
proves nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; commands inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and a tiny model gains nothing from threads

# The same tests everywhere: without a GPU, but for those that are about one.
if not os.environ.get("TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
collect_ignore = [] if os.environ.get("TEST_GPU") else ["gpu"]

# what tests encode stays out of the user's cache of encoded rows, and goes when the tests end
CACHE = tempfile.TemporaryDirectory(prefix="dataflex-tests-", ignore_cleanup_errors=True)
os.environ["HF_DATASETS_CACHE"] = CACHE.name

ROOT = Path(__file__).resolve().parent.parent
MODEL = "SmolLM2-135M-Instruct"


def _made_by_setup(path: Path) -> Path:
    if not path.exists():
        pytest.fail(f"{path} is missing: run `make setup`", pytrace=False)
    return path


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def in_two_processes() -> Callable[[str], list[str]]:
    """Runs a piece of Python in two processes as a launcher starts them, and returns what each printed."""

    def run(code: str) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        where = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env={**where, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        return [process.communicate(timeout=120)[0].strip() for process in started]

    return run


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with dataset_info.json and the demo datasets."""
    _made_by_setup(ROOT / "data" / "dataset_info.json")
    return ROOT / "data"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """SmolLM2-135M-Instruct as float32 safetensors, with its tokenizer. Treat it as read-only."""
    _made_by_setup(ROOT / "models" / MODEL / "converted_from.json")
    return ROOT / "models" / MODEL


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    """The GGUF file that `model_dir` was made from."""
    return _made_by_setup(ROOT / "models" / f"{MODEL}.Q4_1.gguf")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> Path:
    """A random two-layer Llama in float32: the same code paths, in milliseconds.

    Its tokenizer is SmolLM2's, trained anew on rows of the demo to 2,048 tokens; it keeps the template and the special
    tokens. A head of SmolLM2's 49,152 tokens would be most of the work.

    The weights are the same in every session. Treat it as read-only.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny"
    texts = [(data_dir / name).read_text(encoding="utf-8") for name in ("alpaca_en_demo.json", "identity.json")]
    tokenizer = AutoTokenizer.from_pretrained(model_dir).train_new_from_iterator(texts, 2048)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Options of a `dynamic` run of seconds, with real rows: 3 steps, then twice 2 steps on selected rows."""
    target = tmp_path_factory.mktemp("target") / "target.jsonl"
    rows = json.loads((data_dir / "identity.json").read_text())[-4:]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(tiny_model_dir),
        "dataset": "alpaca_en_demo",
        "eval_dataset": str(target),
        "dataset_dir": str(data_dir),
        "template": "qwen",
        "cutoff_len": 64,
        "max_samples": 24,
        "lora_rank": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "num_train_epochs": 1.0,
        "warmup_step": 3,
        "update_step": 2,
        "update_times": 2,
        "logging_steps": 1,
        "token_budget": 200,
        "proj_dim": 512,
    }


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `dataflex ARGS` in a process of its own, as a user does.

    `run_cli(*args, cwd=None, env=None, check=True)`: `env` is added to the environment; with `check` an
    exit code other than 0 fails the test and shows what the command wrote.
    """

    def run(
        *args: object, cwd: Path | None = None, env: dict[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dataflex", *map(str, args)]
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
        )
        if check and done.returncode != 0:
            pytest.fail(
                f"dataflex {' '.join(map(str, args))}: exit code {done.returncode}\n"
                f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}",
                pytrace=False,
            )
        return done

    return run


@pytest.fixture(scope="module")
def checkout(
    tmp_path_factory: pytest.TempPathFactory, repo: Path, data_dir: Path, tiny_model_dir: Path
) -> Iterator[Path]:
    """A copy of the repository's examples/ beside data/ and models/, as a user has them after `make setup`, with the
    tiny model in the demo model's place. Also the working directory."""
    folder = tmp_path_factory.mktemp("checkout") / "dataflex"
    shutil.copytree(repo / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "models").mkdir()
    (folder / "models" / MODEL).symlink_to(tiny_model_dir)
    (folder / "data").symlink_to(data_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder

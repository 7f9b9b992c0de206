"""What stands beside a saved adapter: its card, its chat template, files that others may read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

import dataflex
from dataflex import RunConfig, load_config


@pytest.fixture(scope="module")
def trained(tiny_run: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A `train` of three steps on a base whose tokenizer has no chat template; umask 027."""
    folder = tmp_path_factory.mktemp("run")
    base = folder / "base"
    shutil.copytree(tiny_run["model_name_or_path"], base)
    tokenizer = AutoTokenizer.from_pretrained(base, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    config = load_config(
        options={**tiny_run, "model_name_or_path": str(base), "output_dir": str(folder / "out"), "max_steps": 3}
    )
    before = os.umask(0o027)
    try:
        return config, dataflex.train(config)
    finally:
        os.umask(before)


@pytest.mark.parametrize("place", [".", "checkpoint-3"])
class TestSavedAdapter:
    def test_the_card_says_what_it_was_made_of(self, trained: tuple[RunConfig, Path], place: str) -> None:
        config, folder = trained
        card = (folder / place / "README.md").read_text()
        head = yaml.safe_load(card.split("---\n")[1])
        assert (head["base_model"], head["library_name"]) == (config.model_name_or_path, "peft")
        for line in (
            f"- model_name_or_path: {config.model_name_or_path}",
            "- dataset: alpaca_en_demo",
            "- template: qwen",
            "Every row of the data is trained on, in random order.",
            "- lora_rank: 4",
            "- learning_rate: 0.003",
            "- max_steps: 3",
        ):
            assert f"\n{line}\n" in card
        assert "More Information Needed" not in card

    def test_the_tokenizer_chats_as_it_was_trained_to(self, trained: tuple[RunConfig, Path], place: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(trained[1] / place)
        said = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert said.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.eos_token == "<|im_end|>"

    def test_others_may_read_it(self, trained: tuple[RunConfig, Path], place: str) -> None:
        files = [path for path in (trained[1] / place).iterdir() if path.is_file() and path.name != ".lock"]
        assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
        assert "adapter_model.safetensors" in {path.name for path in files}


def test_a_checkpoints_seal_lists_its_card(trained: tuple[RunConfig, Path]) -> None:
    files = json.loads((trained[1] / "checkpoint-3" / "checkpoint.json").read_text())["files"]
    assert files["README.md"] == (trained[1] / "checkpoint-3" / "README.md").stat().st_size


def test_a_selecting_runs_card_says_how_it_selected(tiny_run: dict, tmp_path: Path) -> None:
    config = load_config(options={**tiny_run, "output_dir": str(tmp_path / "out"), "train_step": 4})
    card = (dataflex.dynamic(config) / "README.md").read_text()
    for line in ("- selector: less", "- warmup_step: 3", "- update_step: 2", "- proj_dim: 512"):
        assert f"\n{line}\n" in card
    assert f"- eval_dataset: {tiny_run['eval_dataset']}\n" in card


def test_a_merged_models_card_quotes_its_adapters(trained: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, adapter = trained
    merged = dataflex.merge(
        load_config(
            options={
                "model_name_or_path": config.model_name_or_path,
                "adapter_name_or_path": f"{adapter / 'checkpoint-3'}",
                "export_dir": str(tmp_path / "merged"),
            }
        )
    )
    card = (merged / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    assert f"\n- model_name_or_path: {config.model_name_or_path}\n" in card
    assert "logits differ from base + adapter by at most" in card
    assert f"\n## Adapter {adapter / 'checkpoint-3'}\n" in card
    assert "\n### Data\n\n- dataset: alpaca_en_demo\n" in card and "\n- lora_rank: 4\n" in card


def test_a_token_in_a_name_stays_out(tiny_run: dict, tmp_path: Path) -> None:
    from dataflex.model_card import adapter_card

    config = load_config(options={**tiny_run, "output_dir": str(tmp_path / "out")})
    secret = config.changed(model_name_or_path="https://me:hf_secret@example.com/model")
    assert "hf_secret" not in adapter_card(secret, tmp_path / "out")

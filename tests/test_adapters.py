"""Adapters as PEFT and other trainers leave them: merged, each is its base plus itself.

The oracle is PEFT's unmerged model on the one side and plain transformers on the merged folder on the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import dataflex
from dataflex import RunConfig, load_config

ROWS = 64
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
    "attention_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
BASES: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "untied": {"model_type": "llama", **SMALL, "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": ROWS, "eos_token_id": 2},
    "mixtral": {
        "model_type": "mixtral", **SMALL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}  # fmt: skip

# What LoraConfig is told, by what it stands for; then whether the merged embedding and head of a tied base are one.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "pairs": ({"target_modules": ["q_proj", "down_proj"]}, True),
    "rank-stabilised": ({"target_modules": ["q_proj"], "use_rslora": True}, True),
    "patterns": (
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        True,
    ),
    "some layers": ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, True),
    "by expression": ({"target_modules": r".*layers\.1\..*(up|v)_proj"}, True),
    "DoRA": ({"target_modules": ["q_proj", "up_proj"], "use_dora": True}, True),
    "embedding": ({"target_modules": ["embed_tokens"]}, False),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "both ends": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "both ends as one": ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True),
    "embedding by DoRA": ({"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "head by DoRA": ({"target_modules": ["lm_head"], "use_dora": True}, False),
    "saved embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "saved head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "saved ends": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "saved ends as one": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "saved norms": ({"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]}, True),
    "saved embedding, pair on the head": ({"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, False),
    "token rows": ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 30, 63]}, True),
    "token rows of each end": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 30], "lm_head": [7]}},
        False,
    ),
    "all biases": ({"target_modules": ["q_proj"], "bias": "all"}, True),
    "its layers' biases": ({"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}, True),
    "a bias of its own": ({"target_modules": ["q_proj"], "lora_bias": True}, True),
    "parameters": ({"target_modules": ["v_proj"], "target_parameters": ["mlp.down_proj.weight"]}, True),
}
CASES = [
    *[(base, kind) for kind in KINDS for base in ("tied", "untied") if (base, "as one" in kind) != ("untied", True)],
]
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D and the head": ("gpt2", {"target_modules": ["c_fc", "lm_head"]}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """`ROWS` words, of which the first three are special."""
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, ROWS))]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base models, saved with a tokenizer of a few words."""
    tokenizer = word_tokenizer()
    folders = {}
    for name, settings in BASES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).float()
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)  # biases and norms say something too
        folders[name] = tmp_path_factory.mktemp("bases") / name
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def make_adapter(base: Path, folder: Path, seed: int = 0, rows: int | None = None, **settings: Any) -> Path:
    """An adapter every trainable number of which was moved, as after training."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **settings}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.tensor([[1, 5, 30, 17, 50, 63, 7]])
    with torch.no_grad():
        return model.eval()(tokens).logits.float()


def unmerged(base: Path, adapter: Path, rows: int | None = None) -> torch.Tensor:
    """The logits of base + adapter by PEFT itself."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return logits(PeftModel.from_pretrained(model, adapter))


def merged_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def merge_config(base: Path, *adapters: Path, **keys: Any) -> RunConfig:
    return load_config(
        options={
            "model_name_or_path": str(base),
            "adapter_name_or_path": ",".join(map(str, adapters)),
            "export_dir": str(adapters[0].parent / "merged"),
            **keys,
        }
    )


def check(base: Path, adapter: Path, folder: Path, rows: int | None = None) -> None:
    expected, found = unmerged(base, adapter, rows), merged_logits(folder)
    size = expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-5 * size))
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (plain - expected[..., : plain.shape[-1]]).abs().max() > 1e-2 * size  # the adapter says something


def tie_of(folder: Path) -> tuple[bool, bool]:
    """What the configuration says, and whether the file has one weight for both ends."""
    said = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return said, "lm_head.weight" not in load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_a_merged_model_is_its_base_plus_its_adapter(
    base: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    settings, one = KINDS[kind]
    adapter = make_adapter(bases[base], tmp_path / "adapter", **settings)
    folder = dataflex.merge(merge_config(bases[base], adapter))
    check(bases[base], adapter, folder)
    assert tie_of(folder) == ((True, True) if base == "tied" and one else (False, False))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_layers(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, settings = OTHERS[kind]
    adapter = make_adapter(bases[base], tmp_path / "adapter", **settings)
    check(bases[base], adapter, dataflex.merge(merge_config(bases[base], adapter)))

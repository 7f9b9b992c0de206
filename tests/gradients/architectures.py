"""Tiny random models of many architectures, and the table of what `lora_target` can be for each.

    .venv/bin/python tests/gradients/architectures.py > ARCHITECTURES.md

`test_architectures.py` checks the table, and each model's gradients against autograd on single rows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dataflex import load_config
from dataflex.data.examples import Example
from dataflex.errors import UsageError
from dataflex.gradients.probe import check_gradients
from dataflex.lora import lora_pairs
from dataflex.model import add_lora

VOCABULARY = 96
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
MOE = {**LLAMA, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 16,
    "factor": 8.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
SSM = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama, dynamic rope": ("llama", {**LLAMA, "max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
    "mistral": ("mistral", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    "gemma": ("gemma", LLAMA),
    "gemma2": ("gemma2", LLAMA),
    "gemma3_text": ("gemma3_text", LLAMA),
    "phi": ("phi", LLAMA),
    "phi3": ("phi3", {**LLAMA, "num_key_value_heads": 4}),
    "phi3, longrope": (
        "phi3",
        {**LLAMA, "num_key_value_heads": 4, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    ),
    "cohere": ("cohere", LLAMA),
    "cohere2": ("cohere2", LLAMA),
    "granite": ("granite", LLAMA),
    "olmo": ("olmo", LLAMA),
    "olmo2": ("olmo2", LLAMA),
    "olmo3": ("olmo3", LLAMA),
    "smollm3": ("smollm3", LLAMA),
    "starcoder2": ("starcoder2", LLAMA),
    "stablelm": ("stablelm", LLAMA),
    "glm": ("glm", LLAMA),
    "glm4": ("glm4", LLAMA),
    "exaone4": ("exaone4", LLAMA),
    "ernie4_5": ("ernie4_5", LLAMA),
    "helium": ("helium", LLAMA),
    "nemotron": ("nemotron", LLAMA),
    "persimmon": ("persimmon", LLAMA),
    "diffllama": ("diffllama", LLAMA),
    "seed_oss": ("seed_oss", LLAMA),
    "bitnet": ("bitnet", LLAMA),
    "arcee": ("arcee", LLAMA),
    "apertus": ("apertus", LLAMA),
    "nanochat": ("nanochat", LLAMA),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", LLAMA),
    "minicpm3": ("minicpm3", {**LLAMA, **DEEPSEEK}),
    "doge": ("doge", LLAMA),
    "qwen3_5_text": (
        "qwen3_5_text",
        {
            **LLAMA,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "gpt_neox": ("gpt_neox", LLAMA),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8}),
    "codegen": ("codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 128,
        },
    ),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "xglm": ("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "qwen3_next": (
        "qwen3_next",
        {
            **MOE,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "olmoe": ("olmoe", MOE),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "glm4_moe": ("glm4_moe", {**DEEPSEEK, "n_shared_experts": 1}),
    "gpt_oss": ("gpt_oss", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": ("llama4_text", {**LLAMA, "num_local_experts": 4, "intermediate_size_mlp": 48}),
    "phimoe": ("phimoe", {**LLAMA, "num_local_experts": 4}),
    "granitemoe": ("granitemoe", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "jetmoe": ("jetmoe", {**LLAMA, "num_local_experts": 4, "kv_channels": 8}),
    "minimax": ("minimax", {**LLAMA, "num_local_experts": 4}),
    "flex_olmo": ("flex_olmo", MOE),
    "exaone_moe": ("exaone_moe", DEEPSEEK),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", MOE),
    "ernie4_5_moe": ("ernie4_5_moe", {**MOE, "moe_num_experts": 4, "moe_k": 2}),
    "lfm2_moe": ("lfm2_moe", {**MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "mamba": ("mamba", SSM),
    "mamba2": ("mamba2", {**SSM, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": ("falcon_mamba", SSM),
    "jamba": (
        "jamba",
        {**LLAMA, "num_experts": 4, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "bamba": (
        "bamba",
        {
            **LLAMA,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 4,
            "mamba_chunk_size": 8,
            "attn_layer_indices": [1],
        },
    ),
    "zamba2": (
        "zamba2",
        {
            **{name: value for name, value in LLAMA.items() if name not in ("num_hidden_layers", "head_dim")},
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "hybrid_layer_ids": [1, 3],
            "mamba_d_state": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "n_mamba_heads": 4,
            "chunk_size": 8,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **LLAMA,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 4,
            "mamba_chunk_size": 8,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **LLAMA,
            "num_local_experts": 4,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 4,
            "mamba_chunk_size": 8,
            "shared_intermediate_size": 16,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **LLAMA,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 4,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "attention"],
        },
    ),
    "lfm2": ("lfm2", {**LLAMA, "layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": ("recurrent_gemma", {**LLAMA, "lru_width": 32, "num_hidden_layers": 3}),
    "rwkv": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 128}),
}
"""By the name in the table: model type and configuration."""


def make_base(name: str) -> torch.nn.Module:
    """A random model with gradients that are not tiny."""
    model_type, changes = SHAPES[name]
    config = AutoConfig.for_model(
        model_type, **changes, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
    model.config.use_cache = False
    return model


def make_rows() -> list[Example]:
    """Rows below, at and above the length at which two of the models switch, two of them of equal length."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate((24, 11, 16, 7, 11)):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Example(number, ids, [-100, -100, *ids[2:]], None, "made"))
    return rows


def adapt(base: torch.nn.Module, target: str) -> torch.nn.Module:
    """`base` with an adapter whose A and B are both random, as after training.

    Raises:
        UsageError: if `lora_target` does not fit.
    """
    model = add_lora(base, load_config(options={"lora_rank": 2, "lora_target": target}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for pair in lora_pairs(model):
            pair.weight_b.copy_(torch.randn(pair.weight_b.shape, generator=generator) * 0.1)
    return model


@dataclass
class Verdict:
    """What `lora_target` can be for an architecture."""

    model: torch.nn.Module
    """With an adapter on `target`."""
    target: str
    """`all`, or the names that its refusal suggests."""
    said: list[str]
    """The refusal of `all`, what it leaves out, and how rows share batches."""


def judge(name: str) -> Verdict:
    """Adapt a model as `lora_target: all` asks for, else as its refusal suggests, and take two rows' gradients."""
    target, said = "all", []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = adapt(make_base(name), target)
        except UsageError as error:
            said.append(str(error))
            target = str(error).rpartition("lora_target=")[2]
            model = adapt(make_base(name), target)
        said += [str(warning.message) for warning in caught if str(warning.message).startswith("lora_target")]
        check_gradients(model, torch.float32, 0, make_rows(), Said(said))
    return Verdict(model, target, said)


class Said:
    """A progress that keeps what it is told."""

    def __init__(self, lines: list[str]) -> None:
        self.say = lines.append


def table_line(name: str, verdict: Verdict) -> str:
    """One line of ARCHITECTURES.md."""
    modules = sorted({pair.name.rpartition(".")[2] for pair in lora_pairs(verdict.model)})
    works = "works" if verdict.target == "all" else "refused; these names work"
    said = "; ".join(line.removeprefix("lora_target: ").partition("; name modules")[0] for line in verdict.said)
    return f"| {name} | {works} | {', '.join(modules)} | {said} |"


HEADER = """# Architectures

What `lora_target: all` does for a model type of transformers: whether gradients of single rows can be taken, the
modules that get a pair, and what is said. Where `all` is refused, the names beside it work. A model that is not here is
tried before anything is trained or written.

`.venv/bin/python tests/gradients/architectures.py > ARCHITECTURES.md` writes this table, and a test over tiny random
models checks it: every row's gradient against autograd on that row alone.

| model type | `all` | modules | said |
|---|---|---|---|"""


if __name__ == "__main__":
    print(HEADER)
    for shape in SHAPES:
        print(table_line(shape, judge(shape)))

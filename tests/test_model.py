"""The base model and the adapter on it: which layers get a pair, in which numbers, on top of what."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.neftune import activate_neftune

from dataflex import RunConfig, load_config, load_examples, train
from dataflex.adapters import read_adapter
from dataflex.errors import UsageError
from dataflex.fingerprints import base_model_fingerprint
from dataflex.folding import check_foldable, fold
from dataflex.gradients.backward import adapter_values, row_gradients
from dataflex.gradients.collect import checkpoint_capture
from dataflex.gradients.forward_state import undisturbed
from dataflex.lora import layout, linear_names, lora_pairs, lora_targets, peft_errors
from dataflex.model import (
    add_lora,
    load_adapter,
    load_base_model,
    load_frozen_model,
)
from dataflex.training.runs import trainable_model

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
LLAMA = sorted([*ATTENTION, "down_proj", "gate_proj", "up_proj"])
# what LLaMA-Factory 0.9.5's find_all_linear_modules finds in transformers 5's models
ALL = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "internlm3": LLAMA,
    "phi": ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"],
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    "glm4": sorted([*ATTENTION, "down_proj", "gate_up_proj"]),
    "mixtral": ATTENTION,
    "qwen2_moe": sorted([*LLAMA, "shared_expert_gate"]),
    "qwen3_moe": ATTENTION,
    "deepseek_v3": [
        "down_proj", "gate_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj", "up_proj",
    ],
    "gpt_neox": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}  # fmt: skip
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": 0,
}


def on_meta(model_type: str, **changes: object) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **changes))


class Named(torch.nn.Module):
    """A module tree by names, as code from the hub brings it along."""

    def __init__(self, model_type: str, **parts: torch.nn.Module) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        for name, part in parts.items():
            self.add_module(name, part)


class LinearEmbedding(torch.nn.Linear):
    """Called linear, but not one of the layers meant."""


class TestTargets:
    @pytest.mark.parametrize("model_type", ALL)
    def test_all(self, model_type: str):
        assert linear_names(on_meta(model_type, **SMALL)) == ALL[model_type]

    @pytest.mark.parametrize(
        "model_type, found",
        [
            ("llama", ["dense", "output", "output_layer", "score"]),
            ("chatglm", ["dense", "output", "score"]),
            ("internlm2", ["dense", "score"]),
        ],
    )
    def test_output_heads_of_other_names(self, model_type: str, found: list[str]):
        names = ["dense", "lm_head", "output", "output_layer", "score"]
        model = Named(model_type, **{name: torch.nn.Linear(2, 2) for name in names}, embed=LinearEmbedding(2, 2))
        assert linear_names(model) == found

    def test_a_model_that_also_sees_is_adapted_in_its_language_model_alone(self):
        model = on_meta("gemma3", text_config={**SMALL, "layer_types": None}, vision_config={"num_hidden_layers": 1})
        towers = {name for name, _ in model.named_modules() if "vision_tower" in name and name.endswith("q_proj")}
        assert towers
        targets = lora_targets(model, ["all"])
        assert len(targets) == 2 * len(LLAMA) and all("language_model.layers" in name for name in targets)
        assert lora_targets(model, ["q_proj"]) == [name for name in targets if name.endswith("q_proj")]

    def test_names(self):
        model = on_meta("llama", **SMALL)
        assert lora_targets(model, ["q_proj", "layers.1.mlp.up_proj"]) == ["q_proj", "layers.1.mlp.up_proj"]
        with pytest.raises(UsageError, match=r"no module 'c_attn'; linear layers are down_proj, .*v_proj"):
            lora_targets(model, ["q_proj", "c_attn"])

    def test_no_linear_layers(self):
        with pytest.raises(UsageError, match="all finds no linear layer in Named; name modules"):
            lora_targets(Named("llama", norm=torch.nn.LayerNorm(2)), ["all"])

    @pytest.mark.parametrize(
        "model_type, changes, wanted, said",
        [
            (
                "llama",
                {},
                "embed_tokens",
                "'embed_tokens' is no linear layer but Embedding; linear layers are",
            ),
            ("llama", {}, "self_attn", "'self_attn' is no linear layer but LlamaAttention"),
            ("mamba", {}, "all", r"all does not fit MambaForCausalLM.*dt_proj, out_proj, x_proj.*lora_target=in_proj$"),
            (
                "mamba",
                {},
                "in_proj,out_proj",
                "a state-space layer uses out_proj without calling it; linear",
            ),
            ("qwen3_moe", {}, "q_proj,gate_proj", "PEFT takes gate_proj for the experts of a qwen3_moe"),
            (
                "deepseek_v3",
                {"n_routed_experts": 8},
                "down_proj",
                "PEFT takes down_proj for the experts of a",
            ),
        ],
    )
    def test_names_that_cannot_be(self, model_type: str, changes: dict, wanted: str, said: str):
        with pytest.raises(UsageError, match=said):
            lora_targets(on_meta(model_type, **{**SMALL, **changes}), wanted.split(","))

    def test_what_all_leaves_out_of_a_mixture_is_said(self):
        with pytest.warns(UserWarning, match="all leaves out down_proj, gate_up_proj: all experts are one tensor"):
            assert lora_targets(on_meta("mixtral", **SMALL), ["all"]) == ATTENTION

    def test_what_peft_refuses_is_one_sentence(self):
        model = on_meta("llama", **SMALL)
        said = "^lora_target: PEFT cannot adapt q_proj of LlamaForCausalLM: a b; linear layers are"
        with pytest.raises(UsageError, match=said), peft_errors(model, ["q_proj"]):
            raise ValueError("a\n  b.")


class TestWhitelist:
    """Every trainable tensor is an A or B of a plain pair, or the adapter is refused by name."""

    @pytest.mark.parametrize(
        "keys, said",
        [
            ({"modules_to_save": ["lm_head"]}, "belongs to modules_to_save"),
            ({"trainable_token_indices": [1, 2]}, "belongs to trainable_token_indices"),
            ({"bias": "all"}, "belongs to bias"),
            ({"lora_bias": True}, r"its B has a bias \(lora_bias\)"),
            ({"use_dora": True}, "Dora is a variant of LoRA"),
            ({"alora_invocation_tokens": [1]}, "ALora is a variant of LoRA"),
            ({"target_modules": ["q_proj", "embed_tokens"]}, "Embedding on Embedding is no LoRA pair"),
            (
                {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]},
                "ParamWrapper on .* is no LoRA pair",
            ),
        ],
    )
    def test_refused(self, keys: dict, said: str):
        base = AutoConfig.for_model(
            "mixtral" if "target_parameters" in keys else "llama", **SMALL, attention_bias="bias" in keys
        )
        lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **keys})
        model = get_peft_model(AutoModelForCausalLM.from_config(base), lora)
        with pytest.raises(UsageError, match=f"^adapter.*{said}.*; gradients of single rows need plain LoRA pairs"):
            lora_pairs(model)

    @pytest.mark.parametrize(
        "keys", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}}, {"target_modules": "lm_head"}]
    )
    def test_taken(self, keys: dict):
        lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **keys})
        assert lora_pairs(get_peft_model(on_meta("llama", **SMALL), lora))


@pytest.fixture
def config(tiny_model_dir: Path, data_dir: Path, tmp_path: Path) -> RunConfig:
    return load_config(
        options={
            "model_name_or_path": str(tiny_model_dir),
            "dataset": "identity",
            "dataset_dir": str(data_dir),
            "template": "qwen",
            "cutoff_len": 64,
            "max_samples": 4,
            "lora_target": "q_proj,v_proj",
            "output_dir": str(tmp_path / "out"),
        }
    )


class TestAdapter:
    def test_its_keys(self, config: RunConfig):
        changed = config.changed(lora_rank=4, lora_dropout=0.25, use_rslora=True)
        model = add_lora(load_base_model(changed, torch.float32), changed)
        pair = lora_pairs(model)[0]
        assert {name.rpartition(".")[2] for name in (pair.name for pair in lora_pairs(model))} == {"q_proj", "v_proj"}
        assert pair.weight_a.shape == (4, 64)
        assert pair.scaling == 8 / 4**0.5  # alpha is 2r
        assert pair.module.lora_dropout["default"].p == 0.25
        plain = config.changed(lora_rank=4, lora_alpha=6)
        assert lora_pairs(add_lora(load_base_model(plain, torch.float32), plain))[0].scaling == 1.5

    @pytest.mark.parametrize("keys, adapter", [({"bf16": True}, torch.float32), ({"pure_bf16": True}, torch.bfloat16)])
    def test_its_numbers(self, config: RunConfig, tmp_path: Path, keys: dict, adapter: torch.dtype):
        model = trainable_model(config.changed(**keys))
        assert {pair.weight_b.dtype for pair in lora_pairs(model)} == {adapter}
        assert lora_pairs(model)[0].module.get_base_layer().weight.dtype == torch.bfloat16
        make_adapter(config, tmp_path / "first")
        again = config.changed(adapter_name_or_path=str(tmp_path / "first"), **keys)
        assert {pair.weight_b.dtype for pair in lora_pairs(trainable_model(again))} == {adapter}

    def test_layer_norms_in_float32(self, config: RunConfig):
        model = load_frozen_model(config.changed(bf16=True, upcast_layernorm=True))
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
            name for name in dtypes if "norm" in name
        }

    def test_it_fits_a_conv1d(self, config: RunConfig, tmp_path: Path):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1))
        lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        get_peft_model(model, lora).save_pretrained(tmp_path)
        check_foldable(AutoModelForCausalLM.from_config(model.config), tmp_path)


def make_adapter(config: RunConfig, folder: Path, seed: int = 0) -> str:
    """An adapter with random weights in both halves, as after training."""
    model = add_lora(load_base_model(config, torch.float32), config)
    torch.manual_seed(seed)
    for pair in lora_pairs(model):
        torch.nn.init.normal_(pair.weight_b, std=0.05)
    model.save_pretrained(folder)
    return str(folder)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 20)[None]).logits


class TestSeveralAdapters:
    @pytest.fixture
    def adapters(self, config: RunConfig, tmp_path: Path) -> list[str]:
        return [make_adapter(config, tmp_path / f"adapter{seed}", seed) for seed in (1, 2)]

    def stacked(self, config: RunConfig, adapters: list[str]) -> torch.nn.Module:
        """The base with each adapter merged by PEFT itself."""
        model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        return model

    def test_all_but_the_last_are_folded_in_and_it_is_gone_on_from(self, config: RunConfig, adapters: list[str]):
        both = config.changed(adapter_name_or_path=adapters)
        model = trainable_model(both)
        torch.testing.assert_close(logits(model), logits(self.stacked(config, adapters)), rtol=0, atol=1e-5)
        last = load_file(Path(adapters[1]) / "adapter_model.safetensors")
        assert all(torch.equal(slot.parameter, last[slot.name]) for slot in layout(lora_pairs(model)))
        assert all(slot.parameter.requires_grad for slot in layout(lora_pairs(model)))

    def test_a_new_adapter_on_all_of_them(self, config: RunConfig, adapters: list[str]):
        new = config.changed(adapter_name_or_path=adapters, create_new_adapter=True)
        model = trainable_model(new)
        torch.testing.assert_close(logits(model), logits(self.stacked(config, adapters)), rtol=0, atol=1e-5)
        assert all((pair.weight_b == 0).all() for pair in lora_pairs(model))

    def test_gradients_are_taken_on_the_same_base(self, config: RunConfig, adapters: list[str]):
        new = config.changed(adapter_name_or_path=adapters[:1], create_new_adapter=True, max_steps=1, learning_rate=0.1)
        checkpoint = train(new) / "checkpoint-1"
        capture = checkpoint_capture(new, checkpoint, 0)
        expected = load_adapter(self.stacked(config, adapters[:1]), checkpoint, config)
        torch.testing.assert_close(logits(capture.model), logits(expected), rtol=0, atol=1e-5)
        alone = checkpoint_capture(config, checkpoint, 0)
        assert (logits(alone.model) - logits(expected)).abs().max() > 1e-3

    def test_they_tell_one_base_from_another(self, config: RunConfig, adapters: list[str]):
        keys = [
            {},
            {"adapter_name_or_path": adapters},
            {"adapter_name_or_path": adapters[::-1]},
            {"adapter_name_or_path": adapters, "create_new_adapter": True},
        ]
        assert len({base_model_fingerprint(config.changed(**changes))[0] for changes in keys}) == len(keys)
        resumed = config.changed(adapter_name_or_path=adapters[:1])
        assert base_model_fingerprint(resumed) == base_model_fingerprint(config)

    def test_a_missing_one_is_a_usage_error(self, config: RunConfig):
        with pytest.raises(UsageError, match=r"adapter gone: no adapter_config\.json"):
            train(config.changed(adapter_name_or_path=["gone"]))
        assert not Path(config.output_dir).exists()


class TestQuantization:
    def test_without_bitsandbytes(self, config: RunConfig, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("dataflex.model.find_spec", lambda name: None)
        with pytest.raises(UsageError, match="quantization_bit needs bitsandbytes: pip install bitsandbytes"):
            train(config.changed(quantization_bit=4))
        assert not Path(config.output_dir).exists()

    @pytest.mark.parametrize(
        "keys, expected",
        [
            ({"quantization_bit": 8}, {"load_in_8bit": True, "load_in_4bit": False}),
            (
                {"quantization_bit": 4, "bf16": True},
                {
                    "load_in_4bit": True,
                    "bnb_4bit_compute_dtype": torch.bfloat16,
                    "bnb_4bit_quant_storage": torch.bfloat16,
                    "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_use_double_quant": True,
                },
            ),
            (
                {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False},
                {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
            ),
        ],
    )
    def test_what_transformers_is_asked_for(self, config: RunConfig, monkeypatch, keys: dict, expected: dict):
        asked: dict = {}

        def from_pretrained(**arguments: object) -> tuple[torch.nn.Module, dict]:
            asked.update(arguments)
            return on_meta("llama", **SMALL), {"missing_keys": []}

        monkeypatch.setattr("dataflex.model.find_spec", lambda name: True)
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
        load_base_model(config.changed(**keys), torch.bfloat16)
        assert {key: getattr(asked["quantization_config"], key) for key in expected} == expected
        assert list(asked["device_map"]) == [""]

    @pytest.mark.parametrize(
        "keys, said",
        [
            ("export_dir=x", "quantization_bit and export_dir exclude each other"),
            ("adapter_name_or_path=a,b", "no adapter to be folded in"),
            ("quantization_method=hqq", "'quantization_method': input should be 'bnb'"),
            ("quantization_bit=3", "'quantization_bit': input should be 4 or 8"),
        ],
    )
    def test_what_it_cannot_go_with(self, keys: str, said: str):
        with pytest.raises(UsageError, match=said):
            load_config(overrides=["quantization_bit=4", *keys.split()])

    def test_nothing_is_folded_into_a_model_that_was_saved_quantized(self, config: RunConfig, tmp_path: Path):
        model = load_base_model(config, torch.float32)
        model.is_quantized = True  # as transformers says of it
        with pytest.raises(UsageError, match="the base model is quantized"):
            fold(model, read_adapter(make_adapter(config, tmp_path / "adapter")))

    def test_a_gguf_file(self, config: RunConfig, gguf_file: Path):
        with pytest.raises(UsageError, match=r"a \.gguf model is dequantized"):
            load_base_model(config.changed(model_name_or_path=str(gguf_file), quantization_bit=4), torch.float32)


def test_the_noise_of_neftune_stays_out_of_gradients(config: RunConfig):
    model = add_lora(load_base_model(config, torch.float32), config).train()
    for pair in lora_pairs(model):
        torch.nn.init.normal_(pair.weight_b, std=0.05)
    example = load_examples(config)[0]
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])

    def gradients() -> dict[str, torch.Tensor]:
        pairs = lora_pairs(model)
        found: dict[str, torch.Tensor] = {}
        with undisturbed(model):
            row_gradients(
                model, pairs, layout(pairs), adapter_values(pairs), ids, labels,
                lambda slot, gradient: found.update({slot.name: gradient.clone()}),
            )  # fmt: skip
        return found

    without = gradients()
    quiet = model(input_ids=ids).logits
    activate_neftune(model, 5.0)  # as the trainer does
    assert not torch.allclose(model(input_ids=ids).logits, quiet)  # there is noise in training
    with_noise = gradients()
    assert without.keys() == with_noise.keys()
    assert all(torch.equal(with_noise[name], without[name]) for name in without)

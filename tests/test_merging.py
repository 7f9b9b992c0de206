"""`merge`: what is written loads everywhere, means base + adapters, and nothing else is lost on the way."""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import dataflex
from dataflex import RunConfig, load_config
from dataflex.data.chat_formats import jinja_template, ollama_modelfile, read_template
from dataflex.data.chat_tokenizer import set_chat
from dataflex.data.template_table import TEMPLATES
from dataflex.errors import DataflexError, UsageError
from dataflex.merging import export_dtype

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def make_adapter(base: Path, folder: Path, seed: int = 0, scale: float = 0.05, **changes: object) -> Path:
    """An adapter with random weights in both halves, as after training."""
    torch.manual_seed(seed)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module, vocabulary: int = 2048) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, vocabulary, 125)[None]).logits.float()


@pytest.fixture
def adapter(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return make_adapter(tiny_model_dir, tmp_path / "adapter")


@pytest.fixture
def config(tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> RunConfig:
    return load_config(
        options={
            "model_name_or_path": str(tiny_model_dir),
            "adapter_name_or_path": str(adapter),
            "export_dir": str(tmp_path / "merged"),
            "template": "qwen",
        }
    )


def test_the_merged_model_is_base_plus_adapter(config: RunConfig, tiny_model_dir: Path, adapter: Path):
    folder = dataflex.merge(config)
    assert folder == Path(config.export_dir)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapter))
    tolerance = 1e-5 if merged.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=tolerance)
    assert (logits(base) - expected).abs().max() > 10 * tolerance
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "Modelfile", "README.md",
    }  # fmt: skip
    assert [path.name for path in folder.parent.glob(".*")] == []
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"


def test_adapters_are_merged_one_after_the_other(
    config: RunConfig, tiny_model_dir: Path, adapter: Path, tmp_path: Path
):
    second = make_adapter(tiny_model_dir, tmp_path / "second", seed=1, r=2, use_rslora=True, target_modules=["v_proj"])
    both = dataflex.merge(config.changed(adapter_name_or_path=f"{adapter},{second}"))
    first = dataflex.merge(config.changed(export_dir=str(tmp_path / "first")))
    stepwise = dataflex.merge(
        config.changed(
            model_name_or_path=str(first), adapter_name_or_path=[str(second)], export_dir=str(tmp_path / "stepwise")
        )
    )
    ours, theirs = load_file(both / "model.safetensors"), load_file(stepwise / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["model.layers.0.self_attn.v_proj.weight"], load_v_proj(first))


def load_v_proj(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"]


class TestDtype:
    def test_float32_stays_without_a_gpu_and_is_halved_with_one(self):
        with_gpu = torch.cuda.is_available()
        halved = torch.bfloat16 if with_gpu and torch.cuda.is_bf16_supported() else torch.float16
        assert export_dtype(torch.float32) == (halved if with_gpu else torch.float32)
        assert export_dtype(torch.float16) == torch.float16
        assert export_dtype(torch.bfloat16) == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_stays_and_the_sum_is_rounded_once(self, config, tiny_model_dir, adapter, tmp_path, dtype):
        half = tmp_path / "half"
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype).save_pretrained(half)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(half)
        folder = dataflex.merge(config.changed(model_name_or_path=str(half)))
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        merged, base = load_file(folder / "model.safetensors"), load_file(half / "model.safetensors")
        assert {tensor.dtype for tensor in merged.values()} == {dtype}
        pair = load_file(adapter / "adapter_model.safetensors")
        name = "model.layers.1.mlp.down_proj"
        a, b = (pair[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        exact = base[f"{name}.weight"].double() + 2 * b.double() @ a.double()  # lora_alpha / r is 2
        error = (merged[f"{name}.weight"].double() - exact).abs()
        half_a_step = exact.abs() * torch.finfo(dtype).eps / 2
        assert (error <= half_a_step * 1.01 + 1e-7).all()


@pytest.mark.parametrize("legacy", [False, True])
def test_shards_and_legacy_files_load_in_plain_transformers(
    config: RunConfig, tmp_path: Path, legacy: bool, monkeypatch
):
    whole = logits(AutoModelForCausalLM.from_pretrained(dataflex.merge(config)))
    sharded = config.changed(export_dir=str(tmp_path / "shards"), export_legacy_format=legacy)
    # export_size counts whole GB, more than this model has: ask for less
    object.__setattr__(sharded, "export_size", 0.0003)
    folder = dataflex.merge(sharded)
    suffix, index = ("bin", "pytorch_model.bin") if legacy else ("safetensors", "model.safetensors")
    shards = sorted(path.name for path in folder.glob(f"*.{suffix}"))
    assert len(shards) > 1
    assert (folder / f"{index}.index.json").is_file()
    named = set(json.loads((folder / f"{index}.index.json").read_text())["weight_map"].values())
    assert named == set(shards)
    assert not list(folder.glob("*.safetensors*")) or not legacy
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), whole)


def test_one_legacy_file(config: RunConfig):
    folder = dataflex.merge(config.changed(export_legacy_format=True))
    assert [path.name for path in folder.glob("*model*")] == ["pytorch_model.bin"]
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)


class TestRefusals:
    def refused(self, config: RunConfig, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            dataflex.merge(config)
        assert not Path(config.export_dir).exists()
        assert [path.name for path in Path(config.export_dir).parent.glob(".*")] == []

    def test_an_adapter_of_another_size(self, config: RunConfig, model_dir: Path, tmp_path: Path, adapter: Path):
        wide = make_adapter(model_dir, tmp_path / "wide")
        # the one that fits comes first: nothing may be merged before all are known to fit
        self.refused(config.changed(adapter_name_or_path=[str(adapter), str(wide)]), UsageError, "wide does not fit")

    def test_an_adapter_that_changes_nothing(self, config: RunConfig, tiny_model_dir: Path, tmp_path: Path):
        idle = make_adapter(tiny_model_dir, tmp_path / "idle", scale=0.0)
        self.refused(config.changed(adapter_name_or_path=[str(idle)]), DataflexError, "idle changes nothing")

    def test_an_adapter_that_is_not_finite(self, config: RunConfig, tiny_model_dir: Path, tmp_path: Path):
        broken = make_adapter(tiny_model_dir, tmp_path / "broken", scale=float("inf"))
        self.refused(config.changed(adapter_name_or_path=[str(broken)]), DataflexError, "broken at .*proj")

    def test_an_unknown_template(self, config: RunConfig):
        self.refused(config.changed(template="qwenn"), UsageError, "did you mean 'qwen'")


class TestOverwriting:
    def test_an_earlier_export_is_replaced_whole(self, config: RunConfig):
        folder = dataflex.merge(config.changed(export_legacy_format=True))
        with pytest.raises(UsageError, match="not empty; give --overwrite"):
            dataflex.merge(config)
        dataflex.merge(config.changed(overwrite=True))
        assert not (folder / "pytorch_model.bin").exists()
        assert [path.name for path in folder.parent.glob(".*")] == []

    @pytest.mark.parametrize("name", ["notes.txt", "checkpoint-10/x", "adapter_model.safetensors", "optimizer.pt"])
    def test_anything_else_is_not(self, config: RunConfig, name: str):
        folder = dataflex.merge(config)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("precious")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(UsageError, match=f"{name.split('/')[0]}, which is no part of an earlier export"):
            dataflex.merge(config.changed(overwrite=True))
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    def test_the_base_and_the_adapter_are_not(self, config: RunConfig, adapter: Path, tmp_path: Path):
        base = dataflex.merge(config)  # a folder that looks like an export, because it is one
        (tmp_path / "link").symlink_to(base)
        over = config.changed(model_name_or_path=str(base), overwrite=True)
        for place in (base, base / "..", tmp_path / "link", adapter):
            with pytest.raises(UsageError, match=r"export_dir .* lies there; choose another"):
                dataflex.merge(over.changed(export_dir=str(place)))
        assert (base / "model.safetensors").exists() and (adapter / "adapter_model.safetensors").exists()

    def test_a_link_to_an_earlier_export_stays_a_link(self, config: RunConfig, tmp_path: Path):
        folder = dataflex.merge(config)
        (tmp_path / "link").symlink_to(folder)
        dataflex.merge(config.changed(export_dir=str(tmp_path / "link"), overwrite=True))
        assert (tmp_path / "link").is_symlink() and (folder / "model.safetensors").is_file()


class TestGeneration:
    def merged(self, config: RunConfig, tiny_model_dir: Path, tmp_path: Path, **settings: object) -> GenerationConfig:
        base = tmp_path / "base"
        AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(base)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(base)
        path = base / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return GenerationConfig.from_pretrained(dataflex.merge(config.changed(model_name_or_path=str(base))))

    @pytest.mark.parametrize("settings", [{"temperature": 0.6, "top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}])
    def test_sampling_values_imply_sampling(self, config, tiny_model_dir, tmp_path, settings):
        generation = self.merged(config, tiny_model_dir, tmp_path, do_sample=False, **settings)
        assert generation.do_sample is True
        assert {key: getattr(generation, key) for key in settings} == settings

    def test_neutral_values_do_not(self, config, tiny_model_dir, tmp_path):
        generation = self.merged(config, tiny_model_dir, tmp_path, do_sample=False, temperature=1.0, top_k=50)
        assert not generation.do_sample

    def test_generation_stops_where_the_template_ends_a_turn(self, config, tiny_model_dir, tmp_path):
        generation = self.merged(config, tiny_model_dir, tmp_path, eos_token_id=0)
        assert generation.eos_token_id == [0, 2]  # <|im_end|>


class TestChat:
    def test_the_tokenizer_ends_turns_as_the_template_does(self, config: RunConfig):
        with pytest.warns(UserWarning, match="<end_of_turn>"):
            folder = dataflex.merge(config.changed(template="gemma"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token == "<end_of_turn>"
        assert 'PARAMETER stop "<end_of_turn>"' in (folder / "Modelfile").read_text()

    def test_a_tokenizer_without_chat_template_gets_the_templates(self, config, tiny_model_dir, tmp_path):
        base = tmp_path / "base"
        AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        own = tokenizer.chat_template
        tokenizer.chat_template = None
        tokenizer.save_pretrained(base)
        folder = dataflex.merge(config.changed(model_name_or_path=str(base)))
        said = AutoTokenizer.from_pretrained(folder).apply_chat_template(QUESTION, tokenize=False)
        assert said == (
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        )
        # one of its own is kept
        kept = dataflex.merge(config.changed(export_dir=str(tmp_path / "kept")))
        assert AutoTokenizer.from_pretrained(kept).chat_template == own

    # where a template thinks, the exported wording leaves thoughts to the model, as LLaMA-Factory's does
    @pytest.mark.parametrize("name", sorted(name for name, template in TEMPLATES.items() if not template.thinks))
    def test_jinja_words_a_conversation_as_the_template_does(self, name: str, tiny_model_dir: Path):
        from dataflex.data.conversations import Conversation, Message
        from dataflex.data.templates import Thinking, encode_turns

        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        template = TEMPLATES[name]
        turns = [("user", "it's"), ("assistant", "a \\ b"), ("user", "more\nlines"), ("assistant", "end")]
        conversation = Conversation([Message(*turn) for turn in turns], "Be 'brief'.", "")
        expected = encode_turns(template, tokenizer, conversation, Thinking(), date(2026, 1, 2))
        tokenizer.chat_template = jinja_template(template, tokenizer)
        messages = [{"role": role, "content": content} for role, content in [("system", "Be 'brief'."), *turns]]
        said = tokenizer.apply_chat_template(messages, tokenize=False)
        assert said == "".join(tokenizer.decode(prompt + response) for prompt, response in expected)

    def test_a_modelfile_for_a_template(self, tiny_model_dir: Path):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        assert ollama_modelfile(TEMPLATES["qwen"], tokenizer).split("\n\n", 1)[1] == (
            'FROM .\n\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
            '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
            "<|im_start|>assistant\n"
            '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"""\n\n'
            'SYSTEM """You are Qwen, created by Alibaba Cloud. You are a helpful assistant."""\n\n'
            'PARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 4096\n'
        )

    def test_a_modelfile_read_off_the_tokenizers_own_template(self, config: RunConfig, tiny_model_dir: Path):
        template = read_template(AutoTokenizer.from_pretrained(tiny_model_dir))
        assert template.user == ("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",)
        assert template.assistant == ("{{content}}<|im_end|>\n",)
        assert template.default_system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        written = (dataflex.merge(config.changed(template=None)) / "Modelfile").read_text()
        assert "<|im_start|>system\n{{ .System }}<|im_end|>" in written and "named SmolLM" in written

    def test_generation_stops_where_training_taught_it_to(
        self, config: RunConfig, tiny_model_dir: Path, tmp_path: Path
    ):
        base = tmp_path / "base"
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model.generation_config.eos_token_id = 0
        model.save_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
        tokenizer.save_pretrained(base)
        for template in (None, "smollm2", "chatml"):
            folder = dataflex.merge(
                config.changed(
                    model_name_or_path=str(base), template=template, export_dir=str(tmp_path / str(template))
                )
            )
            assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 2]  # <|endoftext|>, <|im_end|>
            assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
            assert 'PARAMETER stop "<|im_end|>"' in (folder / "Modelfile").read_text()

    def test_without_a_template_the_tokenizer_is_the_trainings(self, config, tiny_model_dir, adapter, tmp_path):
        base = tmp_path / "base"
        AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, eos_token="<|endoftext|>")
        tokenizer.chat_template = None
        tokenizer.save_pretrained(base)
        set_chat(tokenizer, "qwen")
        tokenizer.save_pretrained(adapter)
        folder = dataflex.merge(config.changed(model_name_or_path=str(base), template=None))
        found = AutoTokenizer.from_pretrained(folder)
        assert (found.eos_token, found.chat_template) == ("<|im_end|>", tokenizer.chat_template)
        assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
        (adapter / "tokenizer.json").write_text("{")
        with pytest.raises(UsageError, match="its tokenizer cannot be read; remove its tokenizer files to take the"):
            dataflex.merge(config.changed(overwrite=True))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_asks_for(config: RunConfig, umask: int):
    before = os.umask(umask)
    try:
        folder = dataflex.merge(config)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def answer(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("base", ["safetensors", "gguf"])
def test_the_real_model_answers_after_merging(base: str, model_dir: Path, gguf_file: Path, tmp_path: Path):
    """A small change on top of SmolLM2 leaves it knowing what it knew."""
    adapter = make_adapter(model_dir, tmp_path / "adapter", scale=1e-3)
    source = {"safetensors": model_dir, "gguf": gguf_file}[base]
    folder = dataflex.merge(
        load_config(
            overrides=[f"model_name_or_path={source}", f"adapter_name_or_path={adapter}", "template=smollm2"],
            options={"export_dir": str(tmp_path / "merged")},
        )
    )
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert "Paris" in answer(folder)

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
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import dataflex
from dataflex import RunConfig, load_config
from dataflex.adapters import read_adapter
from dataflex.errors import DataflexError, UsageError
from dataflex.folding import check_foldable, fold
from dataflex.planning import plan

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


def make_adapter(
    base: Path, folder: Path, seed: int = 0, rows: int | None = None, ends: str | bool = "auto", **settings: Any
) -> Path:
    """An adapter every trainable number of which was moved, as after training.

    `rows`: embeddings of the base as it is trained. `ends`: whether its embedding and head are saved too.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **settings}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, save_embedding_layers=ends)
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


class TestSeveral:
    @pytest.mark.parametrize("base", ["tied", "untied"])
    @pytest.mark.parametrize("kinds", [("pairs", "head"), ("head", "head"), ("embedding", "both ends")])
    def test_pairs_add_up(self, base: str, kinds: tuple[str, str], bases: dict[str, Path], tmp_path: Path) -> None:
        adapters = [
            make_adapter(bases[base], tmp_path / str(seed), seed, **KINDS[kind][0]) for seed, kind in enumerate(kinds)
        ]
        both = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[base]), adapters[0], "0")
        both.load_adapter(adapters[1], "1")
        both.base_model.set_adapter(["0", "1"])
        expected = logits(both)
        found = merged_logits(dataflex.merge(merge_config(bases[base], *adapters)))
        torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-5 * expected.abs().max()))

    @pytest.mark.parametrize("kinds", [("head", "DoRA"), ("saved ends", "token rows"), ("all biases", "head by DoRA")])
    def test_one_trained_on_the_other(self, kinds: tuple[str, str], bases: dict[str, Path], tmp_path: Path) -> None:
        first = make_adapter(bases["tied"], tmp_path / "first", **KINDS[kinds[0]][0])
        halfway = dataflex.merge(merge_config(bases["tied"], first, export_dir=str(tmp_path / "halfway")))
        second = make_adapter(halfway, tmp_path / "second", 1, **KINDS[kinds[1]][0])
        both = dataflex.merge(merge_config(bases["tied"], first, second, export_dir=str(tmp_path / "both")))
        check(halfway, second, both)


class TestVocabulary:
    """Adapters trained with more embeddings than the base has."""

    MORE = ROWS + 5

    @pytest.mark.parametrize("base", ["tied", "untied"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
            {"target_modules": ["q_proj"], "trainable_token_indices": [5, ROWS, ROWS + 1]},
            {"target_modules": ["q_proj"]},
        ],
    )
    def test_it_brings_the_rows(self, base: str, settings: dict, bases: dict[str, Path], tmp_path: Path) -> None:
        adapter = make_adapter(bases[base], tmp_path / "adapter", rows=self.MORE, **settings)
        words = word_tokenizer()
        words.add_tokens([f"new{number}" for number in range(5)])
        words.save_pretrained(adapter)
        folder = dataflex.merge(merge_config(bases[base], adapter))
        check(bases[base], adapter, folder, rows=self.MORE)
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == self.MORE
        assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("new4") == self.MORE - 1

    def test_rows_that_were_trained_alone(self, bases: dict[str, Path], tmp_path: Path) -> None:
        new = list(range(ROWS, self.MORE))
        settings = {"target_modules": ["q_proj"], "trainable_token_indices": [5, *new]}
        adapter = make_adapter(bases["tied"], tmp_path / "adapter", rows=self.MORE, ends=False, **settings)
        check(bases["tied"], adapter, dataflex.merge(merge_config(bases["tied"], adapter)), rows=self.MORE)

    @pytest.mark.parametrize(
        ("base", "settings"),
        [
            ("untied", {"modules_to_save": ["embed_tokens"]}),
            ("untied", {"trainable_token_indices": list(range(ROWS, MORE))}),
            ("tied", {"trainable_token_indices": [MORE - 1]}),
        ],
    )
    def test_rows_that_nobody_knows(self, base: str, settings: dict, bases: dict[str, Path], tmp_path: Path) -> None:
        settings = {"target_modules": ["q_proj"], **settings}
        adapter = make_adapter(bases[base], tmp_path / "adapter", rows=self.MORE, ends=False, **settings)
        with pytest.raises(UsageError, match=r"trained with 69 embeddings, the model has 64.*resize the base"):
            dataflex.merge(merge_config(bases[base], adapter))


class TestAsFound:
    """What other trainers and accidents leave: read where that is safe, else refused in a sentence."""

    @pytest.fixture
    def adapter(self, bases: dict[str, Path], tmp_path: Path) -> Path:
        return make_adapter(bases["tied"], tmp_path / "adapter", target_modules=["q_proj", "v_proj"])

    def rewrite(self, adapter: Path, change: Any) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file(change(dict(tensors)), adapter / "adapter_model.safetensors")

    def configure(self, adapter: Path, **keys: Any) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: f"base_model.model.{name}",
            lambda name: f"base_model.model.base_model.model.{name}",
            lambda name: f"module.{name}",
            lambda name: name.removeprefix("base_model.model."),
            lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
            lambda name: name.replace("base_model.model.", "_fsdp_wrapped_module.base_model.model."),
            lambda name: name.replace(".weight", ".default.weight"),
        ],
    )
    def test_names_that_wrappers_lengthened(
        self, rename: Any, adapter: Path, bases: dict[str, Path], tmp_path: Path
    ) -> None:
        expected = unmerged(bases["tied"], adapter)
        self.rewrite(adapter, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
        found = merged_logits(dataflex.merge(merge_config(bases["tied"], adapter)))
        torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-5 * expected.abs().max()))

    def test_a_bin_file(self, adapter: Path, bases: dict[str, Path]) -> None:
        expected = unmerged(bases["tied"], adapter)
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
        found = merged_logits(dataflex.merge(merge_config(bases["tied"], adapter)))
        torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-5 * expected.abs().max()))

    def test_a_newer_configuration_that_says_nothing_new(self, adapter: Path, bases: dict[str, Path]) -> None:
        self.configure(adapter, use_something_new=False, something_config=None, things=[])
        check(bases["tied"], adapter, dataflex.merge(merge_config(bases["tied"], adapter)))

    def refused(self, adapter: Path, base: Path, match: str) -> None:
        """By a merge, and by the dry run of one."""
        config = merge_config(base, adapter)
        for run in (dataflex.merge, lambda config: plan(config, "merge")):
            with pytest.raises(UsageError, match=match) as caught:
                run(config)
            said = str(caught.value)
            assert "\n" not in said and not said.endswith(":") and "Error" not in said
        assert not Path(config.export_dir).exists()

    @pytest.mark.parametrize(
        ("keys", "match"),
        [
            ({"use_something_new": True}, "sets use_something_new, which PEFT .* does not know; install a newer peft"),
            ({"peft_type": "IA3"}, "peft_type IA3, and LORA is the one"),
            ({"peft_type": None}, "peft_type None"),
            ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS, and CAUSAL_LM is the one"),
            ({"r": 0}, "r must be a whole number above 0"),
            ({"r": "4"}, "r must be a whole number above 0"),
            ({"r": 8}, r"q_proj.lora_A.weight is \[4, 32\], but the model needs \[8, 32\]"),
            ({"target_modules": ["c_attn"]}, "PEFT cannot adapt c_attn of a LlamaForCausalLM; name the base it was"),
            ({"target_modules": ["q_proj"]}, r"it adapts .*v_proj.*, which the model lacks"),
            ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, r"it lacks .*k_proj.*, which its configuration names"),
            ({"target_modules": 7}, "target_modules must be names of modules"),
            ({"modules_to_save": [7]}, "modules_to_save must be names of modules"),
            ({"modules_to_save": ["lm_head"]}, "it lacks .*lm_head.weight, which its configuration names"),
            ({"bias": "some"}, "does not take|cannot adapt"),
            ({"use_dora": True}, "it lacks .*magnitude"),
            ({"alora_invocation_tokens": [5]}, "cannot be merged: alora_invocation_tokens is set, and .*; serve it"),
            ({"layer_replication": [[0, 2]]}, "cannot be merged: layer_replication is set"),
        ],
    )
    def test_configurations(self, keys: dict, match: str, adapter: Path, bases: dict[str, Path]) -> None:
        self.configure(adapter, **keys)
        self.refused(adapter, bases["tied"], match)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\xff"])
    def test_a_configuration_that_is_none(self, text: str, adapter: Path, bases: dict[str, Path]) -> None:
        (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
        self.refused(adapter, bases["tied"], r"adapter_config\.json (is not JSON|does not say its peft_type); copy")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda tensor: torch.empty(0), r"of shape \[0\], a part of a tensor, as ZeRO-3.*zero_to_fp32"),
            (lambda tensor: tensor.flatten()[:64].clone(), r"of shape \[64\], a part of a tensor, as ZeRO-3"),
            (lambda tensor: tensor[:2].clone(), r"is \[2, 32\], but the model needs \[4, 32\]"),
            (lambda tensor: tensor * float("nan"), r"q_proj.*not all of its numbers are finite; train it again"),
            (lambda tensor: tensor * float("inf"), r"q_proj.*not all of its numbers are finite; train it again"),
        ],
    )
    def test_tensors(self, change: Any, match: str, adapter: Path, bases: dict[str, Path]) -> None:
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        self.rewrite(adapter, lambda tensors: {**tensors, name: change(tensors[name])})
        self.refused(adapter, bases["tied"], match)

    def test_tensors_that_are_missing(self, adapter: Path, bases: dict[str, Path]) -> None:
        self.rewrite(adapter, lambda tensors: {k: v for k, v in tensors.items() if "layers.1" not in k})
        self.refused(adapter, bases["tied"], r"it lacks .*layers\.1\..*, which its configuration names")

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
    def test_files_cut_off(self, name: str, adapter: Path, bases: dict[str, Path]) -> None:
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        whole = (adapter / name).read_bytes()
        (adapter / "adapter_model.safetensors").unlink()
        for size in (0, 5, len(whole) // 2):
            (adapter / name).write_bytes(whole[:size])
            self.refused(adapter, bases["tied"], r"is not a whole (safetensors|torch) file|holds more than tensors")

    def test_a_pickle_that_would_run_code(self, adapter: Path, bases: dict[str, Path], tmp_path: Path) -> None:
        class Touch:
            def __reduce__(self) -> tuple:
                return Path.touch, (tmp_path / "was here",)

        torch.save({"a": Touch()}, adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
        self.refused(adapter, bases["tied"], "holds more than tensors, and code from disk is not run")
        assert not (tmp_path / "was here").exists()

    def test_no_weights(self, adapter: Path, bases: dict[str, Path]) -> None:
        (adapter / "adapter_model.safetensors").unlink()
        self.refused(adapter, bases["tied"], r"no adapter_model\.safetensors and no adapter_model\.bin; name a folder")

    def test_a_base_of_other_layers(self, adapter: Path, bases: dict[str, Path]) -> None:
        self.refused(adapter, bases["gpt2"], "PEFT cannot adapt q_proj, v_proj of a GPT2LMHeadModel; name the base .*")

    def test_a_base_of_another_name_is_said(self, adapter: Path, bases: dict[str, Path]) -> None:
        self.configure(adapter, base_model_name_or_path="someone/another-model")
        with pytest.warns(UserWarning, match=r"was trained on someone/another-model, and is merged into"):
            dataflex.merge(merge_config(bases["tied"], adapter))

    def test_a_bias_that_the_base_has_no_place_for(self, bases: dict[str, Path], tmp_path: Path) -> None:
        adapter = make_adapter(bases["tied"], tmp_path / "adapter", target_modules=["up_proj"], lora_bias=True)
        self.refused(adapter, bases["tied"], r"adds a bias \(lora_bias\) where the base has none.*serve it with PEFT")

    def test_a_weight_that_other_layers_share(self, bases: dict[str, Path], tmp_path: Path) -> None:
        adapter = make_adapter(bases["tied"], tmp_path / "adapter", target_modules=["q_proj"])
        model = AutoModelForCausalLM.from_pretrained(bases["tied"])
        first, second = (layer.self_attn.q_proj for layer in model.model.layers)
        second.weight = first.weight
        with pytest.raises(UsageError, match=r"q_proj: other layers share this weight.*serve the adapter with PEFT"):
            fold(model, read_adapter(adapter))

    def test_a_look_leaves_the_model_as_it_is(self, adapter: Path, bases: dict[str, Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(bases["tied"])
        check_foldable(model, adapter)
        assert plan(merge_config(bases["tied"], adapter), "merge").unknown == []
        assert not any("lora" in name for name, _ in model.named_modules())
        self.configure(adapter, r=8)
        with pytest.raises(UsageError, match="but the model needs"):
            check_foldable(model, adapter)


class TestDryRun:
    @pytest.fixture
    def config(self, bases: dict[str, Path], tmp_path: Path) -> RunConfig:
        adapter = make_adapter(bases["tied"], tmp_path / "adapter", target_modules=["q_proj"])
        return merge_config(bases["tied"], adapter)

    def test_what_is_wrong_without_the_weights(self, config: RunConfig, tmp_path: Path) -> None:
        assert plan(config, "merge").unknown == []
        for key, value, match in (
            ("template", "qwenn", "did you mean 'qwen'"),
            ("adapter_name_or_path", "gone", r"adapter gone: no adapter_config\.json"),
            ("model_name_or_path", str(tmp_path / "gone"), "model_name_or_path: no folder .*gone"),
        ):
            with pytest.raises(UsageError, match=match):
                plan(config.changed(**{key: value}), "merge")
        assert not Path(config.export_dir).exists()

    def test_a_base_that_is_not_here_is_no_fault(self, config: RunConfig) -> None:
        [said] = plan(config.changed(model_name_or_path="someone/not-downloaded"), "merge").unknown
        assert said.startswith("whether the adapters fit: that shows with the base model")

    def test_the_template_is_an_option(self, config: RunConfig, run_cli: Any) -> None:
        options = ["--model", config.model_name_or_path, "--adapter", config.adapter_name_or_path[0]]
        done = run_cli("merge", *options, "--export-dir", config.export_dir, "--template", "alpaca")
        assert "logits differ from base + adapter by at most" in done.stderr
        assert "### Instruction:" in (Path(config.export_dir) / "Modelfile").read_text()


class TestReadingBack:
    """What was written is held against base + adapter, and against its own configuration."""

    @pytest.fixture
    def config(self, bases: dict[str, Path], tmp_path: Path) -> RunConfig:
        adapter = make_adapter(bases["untied"], tmp_path / "adapter", target_modules=["q_proj"])
        return merge_config(bases["untied"], adapter)

    def spoiled(self, config: RunConfig, monkeypatch: pytest.MonkeyPatch, spoil: Any, match: str) -> None:
        """A model's folder that something spoils as it is written is found out, and nothing of it is left."""
        save = LlamaForCausalLM.save_pretrained

        def save_and_spoil(model: Any, folder: Path, **keys: Any) -> None:
            save(model, folder, **keys)
            spoil(Path(folder))

        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_and_spoil)
        before = sorted(Path(config.export_dir).parent.iterdir())
        with pytest.raises(DataflexError, match=match) as caught:
            dataflex.merge(config)
        assert caught.value.exit_code == 1
        assert sorted(Path(config.export_dir).parent.iterdir()) == before

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("tie_word_embeddings", True, "tie_word_embeddings"),
            ("rms_norm_eps", 0.1, "the merged model is not base . adapter: logits differ"),
            ("vocab_size", 65, "cannot load what was written"),
            ("num_hidden_layers", 1, "unexpected keys"),
            ("num_hidden_layers", 3, "missing keys"),
            ("dtype", "bfloat16", "dtype|not base"),
        ],
    )
    def test_a_configuration_of_another_model(self, config, monkeypatch, key, value, match) -> None:
        def spoil(folder: Path) -> None:
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

        self.spoiled(config, monkeypatch, spoil, match)

    @pytest.mark.parametrize("change", [1.01, float("nan")])
    def test_other_weights(self, config, monkeypatch, change: float) -> None:
        def spoil(folder: Path) -> None:
            tensors = load_file(folder / "model.safetensors")
            tensors["model.norm.weight"] = tensors["model.norm.weight"] * change
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})

        self.spoiled(config, monkeypatch, spoil, "is not base . adapter: logits differ .* by at most")

    def test_a_stop_token_that_the_model_does_not_have(self, config, monkeypatch) -> None:
        def spoil(folder: Path) -> None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ROWS]}))

        self.spoiled(config, monkeypatch, spoil, "eos_token_id 64 for 64 embeddings")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", ["pairs", "head", "token rows", "saved ends"])
    def test_half_precision(self, kind: str, dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path) -> None:
        half = tmp_path / "half"
        AutoModelForCausalLM.from_pretrained(bases["tied"], dtype=dtype).save_pretrained(half)
        word_tokenizer().save_pretrained(half)
        adapter = make_adapter(half, tmp_path / "adapter", **KINDS[kind][0])
        folder = dataflex.merge(merge_config(half, adapter))
        expected = unmerged(half, adapter)
        found = AutoModelForCausalLM.from_pretrained(folder)
        assert found.dtype == dtype
        tolerance = 20 * torch.finfo(dtype).eps * expected.abs().max()
        torch.testing.assert_close(logits(found), expected, rtol=0, atol=float(tolerance))

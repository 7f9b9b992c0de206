"""From YAML, options and key=value to a RunConfig: what wins over what, and what each mistake is told."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex import RunConfig, load_config
from dataflex.config import save_config
from dataflex.errors import UsageError
from dataflex.peer_keys import PEER_KEYS, REFUSED_KEYS, RENAMED_KEYS
from dataflex.trainer_keys import TrainerKeys


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("error")  # a warning nobody expected fails the test


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return path


def complaint(*args: object, **kwargs: object) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(*args, **kwargs)
    return str(caught.value)


COMPONENTS = "less:\n  name: less\n  params: {proj_dim: 4096, seed: 7, gradient_type: sgd, reduce: mean}\n"


class TestPrecedence:
    def test_defaults_alone(self):
        config = load_config()
        assert (config.lora_rank, config.proj_dim, config.proj_seed, config.selector) == (8, 8192, 123, "less")

    def test_each_source_wins_over_the_next(self):
        write("parts.yaml", COMPONENTS)
        path = write("run.yaml", "components_cfg_file: parts.yaml\ngradient_type: sign\ncutoff_len: 100\nreduce: max\n")
        config = load_config(path, ["reduce=round-robin"], {"cutoff_len": 200, "reduce": "mean"})
        assert config.proj_dim == 4096  # component over default
        assert config.gradient_type == "sign"  # YAML over component
        assert config.cutoff_len == 200  # option over YAML
        assert config.reduce == "round-robin"  # override over all

    @pytest.mark.parametrize("head", ["", "selectors:\n"])
    def test_components_stand_under_selectors_or_not(self, head: str):
        text = COMPONENTS if not head else head + "".join(f"  {line}\n" for line in COMPONENTS.splitlines())
        write("parts.yaml", text)
        config = load_config(overrides=["components_cfg_file=parts.yaml"])
        assert (config.proj_dim, config.proj_seed, config.reduce) == (4096, 7, "mean")

    def test_a_components_seed_is_the_projections_not_the_runs(self):
        write("parts.yaml", COMPONENTS)
        config = load_config(overrides=["components_cfg_file=parts.yaml", "seed=1"])
        assert (config.seed, config.proj_seed) == (1, 7)
        config = load_config(overrides=["components_cfg_file=parts.yaml", "proj_seed=9"])
        assert (config.seed, config.proj_seed) == (42, 9)

    def test_a_component_of_another_name_may_stand_for_the_same_selector(self):
        write("parts.yaml", "mine: {name: less, params: {proj_dim: null}}\nrandom: {name: random}\n")
        config = load_config(overrides=["components_cfg_file=parts.yaml", "component_name=mine"])
        assert (config.selector, config.proj_dim, config.is_exact) == ("less", None, True)
        config = load_config(overrides=["components_cfg_file=parts.yaml", "component_name=random"])
        assert config.selector == "random"

    def test_values_of_overrides_are_read_as_yaml(self):
        config = load_config(overrides=["proj_dim=null", "bf16=true", "dataset=[a, b]", "template=", "run_name=[a"])
        assert (config.proj_dim, config.bf16, config.dataset) == (None, True, ["a", "b"])
        assert config.template is None
        assert config.run_name == "[a"  # not a YAML text: taken as it stands

    def test_an_empty_yaml_is_a_yaml(self):
        assert load_config(write("run.yaml", "# nothing\n")) == load_config()


class TestComplaints:
    def test_an_unknown_key_gets_a_suggestion(self):
        said = complaint(write("run.yaml", "leraning_rate: 1.0e-4\n"))
        assert "run.yaml" in said and "'leraning_rate': unknown; did you mean 'learning_rate'?" in said

    def test_an_unknown_parameter_of_a_component_names_the_file(self):
        write("parts.yaml", "less: {name: less, params: {proj_dims: 8}}\n")
        said = complaint(overrides=["components_cfg_file=parts.yaml"])
        assert "parts.yaml" in said and "'proj_dims': unknown; did you mean 'proj_dim'?" in said

    def test_all_problems_come_at_once(self):
        write("parts.yaml", "less: {name: less, params: {proj_dims: 8}}\n")
        path = write(
            "run.yaml",
            "components_cfg_file: parts.yaml\nlora_rank: -1\nlerning_rate: 1\nbf16: true\nfp16: true\nmax_steps: 0\n"
            "top: 0.1\ncount: 3\nuse_dora: true\ndeepspeed: nowhere.json\nstage: dpo\n",
        )
        said = complaint(path, ["novalue", "gradient_type=adma"])
        lines = said.splitlines()
        assert lines[0] == "config run.yaml and arguments: 11 problems"
        assert len(lines) == 12
        for part in (
            "proj_dims", "'lora_rank': input should be greater than 0, not -1", "lerning_rate", "bf16 and fp16",
            "max_steps is 0", "top, count and threshold", "use_dora", "nowhere.json", "'stage'", "'novalue'",
            "'gradient_type': input should be 'adam', 'sgd' or 'sign', not 'adma'",
        ):  # fmt: skip
            assert any(part in line for line in lines), part

    @pytest.mark.parametrize(
        "text, arguments, told",
        [
            ("lora_rank: 4\n", ["learning_rat=3"], "arguments: key 'learning_rat': unknown; did you mean"),
            ("lora_rank: -1\n", ["lora_rank=0"], "arguments: key 'lora_rank': input should be greater than 0, not 0"),
            ("lora_rank: -1\n", ["cutoff_len=9"], "config run.yaml: key 'lora_rank': input should be greater than 0"),
            ("lora_rank: 4\n", ["novalue", "adam_beta1=x"], "arguments: 2 problems\n  argument 'novalue': expected"),
            ("lora_rank: -1\n", ["cutoff_len=0"], "config run.yaml: 2 problems\n"),
            ("lora_rank: 4\n", ["learning-rate=3"], "arguments: key 'learning-rate': unknown; did you mean"),
            (
                "lora_rank: 4\n",
                ["evaluation_strategy=steps", "eval_strategy=steps"],
                "arguments: key 'evaluation_strategy'",
            ),
            ("lora_rank: 4\n", ["eval_delay=x"], "arguments: key 'eval_delay'"),
            ("bf16: true\n", ["fp16=true"], "config run.yaml and arguments: "),
            ("bf16: true\nfp16: true\n", [], "config run.yaml: "),
        ],
    )
    def test_it_is_said_whether_the_file_or_an_argument_is_wrong(self, text: str, arguments: list[str], told: str):
        said = complaint(write("run.yaml", text), arguments)
        assert said.startswith(told)
        assert [line for line in said.splitlines() if line.endswith("(an argument)")] == [
            line for line in said.splitlines()[1:] if "cutoff_len" in line
        ]

    def test_keys_are_checked_against_each_other_beside_wrong_ones(self):
        assert "bf16 and fp16" in complaint(overrides=["bf16=true", "fp16=true", "lora_rank=none"])
        # a wrong bf16 is one problem, not two
        assert complaint(overrides=["bf16=maybe", "fp16=true"]).count("bf16") == 1

    @pytest.mark.parametrize(
        "key, reason",
        [
            ("use_dora: true", "plain LoRA pairs"),
            ("additional_target: embed_tokens", "plain LoRA pairs"),
            ("packing: true", "rows must stay rows"),
            ("streaming: true", "scored by number"),
            ("use_galore: true", "another optimizer"),
            ("group_by_length: true", "the order of rows"),
            ("train_sampling_strategy: group_by_length", "the order of rows"),
            ("auto_find_batch_size: true", "rows a step"),
            ("use_cpu: true", "CUDA_VISIBLE_DEVICES"),
            ("fsdp: full_shard", "DeepSpeed"),
        ],
    )
    def test_keys_that_would_change_the_result_are_refused(self, key: str, reason: str):
        said = complaint(write("run.yaml", f"{key}\n"))
        assert key.split(":")[0] in said and reason in said and "remove it" in said

    def test_refused_keys_that_are_off_do_no_harm(self):
        load_config(
            write(
                "run.yaml",
                "use_dora: false\nstreaming: null\npacking: false\nlabel_smoothing_factor: 0\n"
                "train_sampling_strategy: random\n",
            )
        )

    @pytest.mark.parametrize(
        "key, said",
        [
            (
                "finetuning_type: full",
                "'finetuning_type': expected lora, the one there is (gradients are taken at LoRA",
            ),
            ("finetuning_type: freeze", "not 'freeze'"),
            ("stage: dpo", "'stage': expected sft, the one there is (rows are scored by its loss), not 'dpo'"),
            ("lora_target: ''", "'lora_target'"),
        ],
    )
    def test_what_is_not_supported_says_what_is(self, key: str, said: str):
        assert said in complaint(write("run.yaml", f"{key}\n"))

    def test_no_key_is_told_apart_in_two_ways(self):
        kinds = (RunConfig.model_fields, TrainerKeys.__annotations__, PEER_KEYS, REFUSED_KEYS, RENAMED_KEYS)
        names = [name for kind in kinds for name in kind]
        assert sorted(names) == sorted(set(names))

    def test_every_key_of_transformers_is_told_apart(self):
        from transformers import TrainingArguments

        kinds = (RunConfig.model_fields, TrainerKeys.__annotations__, PEER_KEYS, REFUSED_KEYS, RENAMED_KEYS)
        known = {name for kind in kinds for name in kind}
        assert [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in known] == []

    def test_peers_keys_give_one_warning(self):
        path = write("run.yaml", "torch_compile: true\nuse_cache: false\ninfer_dtype: auto\nlora_rank: 4\n")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = load_config(path, ["temperature=0.1"])
        assert config.lora_rank == 4
        assert len(caught) == 1
        said = str(caught[0].message)
        assert "run.yaml" in said and all(key in said for key in ("torch_compile", "use_cache", "infer_dtype"))
        assert "temperature" in said and "lora_rank" not in said

    @pytest.mark.parametrize(
        "text, line, reason",
        [
            ("a: 1\nb: [1, 2\nc: 3\n", 3, "not valid YAML"),
            ("lora_rank: 1\n\nlora_rank: 2\n", 3, "'lora_rank' stands twice"),
            ("lora_rank: 8\n\tcutoff_len: 3\n", 2, "not valid YAML"),
            ("a: &x 1\nb: *y\n", 2, "not valid YAML"),
            ("lora_rank: !!python/object:os.system 1\n", 1, "not valid YAML"),
        ],
    )
    def test_malformed_yaml_is_told_with_its_line(self, text: str, line: int, reason: str):
        said = complaint(write("run.yaml", text))
        assert f"run.yaml, line {line}" in said and reason in said

    @pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "3\n"])
    def test_a_yaml_that_holds_no_keys(self, text: str):
        assert "expected lines of `key: value`" in complaint(write("run.yaml", text))

    def test_bytes_that_are_no_text(self):
        Path("run.yaml").write_bytes(b"lora_rank: \xff\xfe\x00")
        assert "run.yaml: not UTF-8 text" in complaint("run.yaml")

    def test_missing_files(self):
        assert "nowhere.yaml: No such file" in complaint("nowhere.yaml")
        assert "parts.yaml: No such file" in complaint(overrides=["components_cfg_file=parts.yaml"])

    def test_an_unknown_component_lists_the_known(self):
        write("parts.yaml", "selectors:\n  a: {name: less}\n  b: {name: random}\n")
        said = complaint(overrides=["components_cfg_file=parts.yaml", "component_name=c"])
        assert "no 'c' in components file parts.yaml; it has a, b" in said
        said = complaint(overrides=["component_name=losss"])
        assert "no selector 'losss'; there are less, random, rds, " in said
        assert "less-contrast, " in said and said.endswith("and package.module:Class; did you mean 'loss'?")

    def test_a_packaged_component_is_a_selector_and_its_keys(self):
        config = load_config(overrides=["component_name=less-contrast-rds", "contrast=16"])
        assert (config.selector, config.marginal, config.contrast) == ("less+rds", True, 16)


class TestPaths:
    def test_an_input_path_is_found_beside_the_yaml(self):
        write("there/rows.jsonl", "{}\n")
        write("there/ds.json", "{}")
        write("there/data/x", "")
        path = write(
            "there/run.yaml",
            "dataset: rows.jsonl,named\ndeepspeed: ds.json\ndataset_dir: data\noutput_dir: data\nscores: gone.jsonl\n",
        )
        config = load_config(path)
        assert config.dataset == ["there/rows.jsonl", "named"]
        assert (config.deepspeed, config.dataset_dir) == ("there/ds.json", "there/data")
        assert config.output_dir == "data"  # outputs are relative to the working directory
        assert config.scores == "gone.jsonl"

    def test_the_working_directory_comes_first(self):
        write("there/rows.jsonl", "{}\n")
        write("rows.jsonl", "{}\n")
        assert load_config(write("there/run.yaml", "dataset: rows.jsonl\n")).dataset == ["rows.jsonl"]


class TestRoundTrip:
    @pytest.mark.parametrize("proj_dim", [None, 512])
    def test_a_saved_config_reads_back_the_same(self, proj_dim: int | None):
        write("parts.yaml", COMPONENTS)
        config = load_config(
            overrides=[
                "components_cfg_file=parts.yaml",
                f"proj_dim={'null' if proj_dim is None else proj_dim}",
                "dataset=a,b",
                "lr_scheduler_kwargs={num_cycles: 2}",
                "learning_rate=1e-5",
                "run_name=été",
                "report_to=null",
            ]
        )
        save_config(config, Path("config.yaml"))
        again = load_config("config.yaml")
        # what the components file said is in the values, so the file is no longer named
        assert again == config.changed(components_cfg_file=None)
        assert (again.proj_dim, again.proj_seed, again.gradient_type) == (proj_dim, 7, "sgd")

    def test_changed_is_checked_again(self):
        with pytest.raises(ValueError, match="bf16"):
            load_config(overrides=["bf16=true"]).changed(fp16=True)


def test_the_seeds_yamls_load_as_they_stand(repo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(repo)
    less = load_config("examples/less.yaml")
    assert (less.lora_alpha, less.learning_rate, less.warmup_ratio, less.save_only_model) == (8, 1e-4, 0.1, False)
    assert (less.proj_dim, less.proj_seed, less.cache_dir) == (4096, 123, "../dataflex_saves/less_output")
    assert less.deepspeed == "examples/deepspeed/ds_z3_config.json"
    merge = load_config("examples/merge.yaml")
    assert (merge.export_size, merge.export_device, merge.export_legacy_format) == (5, "cpu", False)
    for path in sorted(Path("examples").glob("*.yaml")):
        if path.name != "components.yaml":
            load_config(path)


def test_every_key_has_help():
    assert [name for name, field in RunConfig.model_fields.items() if not field.description] == []


KEYS = st.sampled_from(sorted(RunConfig.model_fields)) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.binary(max_size=4) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=4,
)


def loads_or_complains(text: str | bytes) -> None:
    Path("fuzz.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert isinstance(load_config("fuzz.yaml"), RunConfig)
        except UsageError as error:
            assert "fuzz.yaml" in str(error)


FUZZ = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@FUZZ
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_values_load_or_are_a_usage_error(values: dict):
    loads_or_complains(yaml.safe_dump(values))


@FUZZ
@given(st.text(max_size=60) | st.binary(max_size=40) | st.text("ab:-[]{}&*!|>'\"#%@ \n\t?,", max_size=40))
def test_any_text_loads_or_is_a_usage_error(text: str | bytes):
    loads_or_complains(text)


@FUZZ
@given(st.lists(st.text(max_size=20) | st.tuples(KEYS, st.text(max_size=10)).map("=".join), max_size=3))
def test_any_override_loads_or_is_a_usage_error(overrides: list[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(UsageError):
            load_config(overrides=overrides)

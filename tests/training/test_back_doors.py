"""No setting comes in by the environment: every variable that a library would read over the YAML."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dataflex import environment, load_config, train
from dataflex.environment import HARMLESS, OTHER_WAYS, back_doors, without_back_doors
from dataflex.errors import UsageError
from dataflex.training.arguments import training_arguments

# Variables that the libraries read and that may come through, and why.
LET_THROUGH = {
    **dict.fromkeys(HARMLESS, "what is logged, and where a thread runs"),
    **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "who the process is"),
    **dict.fromkeys(("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"), "where the processes meet"),
    **dict.fromkeys(("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "OMP_NUM_THREADS"), "how the machine computes"),
    **dict.fromkeys(("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG"), "written by full_determinism"),
    **dict.fromkeys(("ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC", "FLASH_ATTENTION_DETERMINISTIC"), "the same"),
    **dict.fromkeys(("XLA_USE_BF16", "XLA_DOWNCAST_BF16", "PT_HPU_LAZY_MODE", "DEEPSPEED_USE_HPU"), "other devices"),
    "PYTORCH_ENABLE_MPS_FALLBACK": "other devices",
    "FOO": "an example in a docstring",
    "SMDATAPARALLEL_LOCAL_RANK": "read where smdistributed is installed",
}  # fmt: skip
READ_BY = {
    "accelerate": (
        "accelerator.py",
        "state.py",
        "utils/dataclasses.py",
        "utils/environment.py",
        "parallelism_config.py",
    ),
    "transformers": ("trainer.py", "training_args.py", "trainer_utils.py", "trainer_pt_utils.py"),
}
PREFIXES = {"env_prefix": ("FSDP_", "ACCELERATE_FP8_"), "prefix": ("ACCELERATE_DYNAMO_", "MEGATRON_LM_")}


def variables_read() -> set[str]:
    """The names of variables in the sources of the installed libraries."""
    found: set[str] = set()
    for package, files in READ_BY.items():
        folder = Path(importlib.util.find_spec(package).origin).parent
        for name in files:
            text = (folder / name).read_text(encoding="utf-8")
            call = r"(?:environ(?:\.get)?|getenv|parse_flag_from_env|parse_choice_from_env)\s*[\[(]\s*"
            found.update(re.findall(call + r"f?[\"']([A-Z][A-Z0-9_]+)[\"']", text))
            for several in re.findall(r"get_int_from_env\(\s*\[([^\]]*)\]", text):
                found.update(re.findall(r"[\"'](\w+)[\"']", several))
            for prefix, suffix in re.findall(call + r"((?:env_)?prefix) \+ [\"']([A-Z0-9_]+)[\"']", text):
                found.update(before + suffix for before in PREFIXES[prefix])
    return found


def test_every_variable_that_is_read_is_known():
    found = variables_read()
    assert {"ACCELERATE_MIXED_PRECISION", "FSDP_SHARDING_STRATEGY", "ACCELERATE_DYNAMO_BACKEND", "PMI_SIZE"} <= found
    assert len(found) > 80
    kept_away = set(back_doors({**dict.fromkeys(found, "x"), "RANK": "0"}))
    assert found - kept_away == found & LET_THROUGH.keys()


@pytest.fixture
def config(tiny_run: dict, tmp_path: Path):
    more = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "gradient_accumulation_steps": 2}
    return load_config(options={**tiny_run, **more})


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_none_of_them_changes_a_bit(config, tmp_path, monkeypatch):
    wanted = adapter(train(config))
    record = json.loads((tmp_path / "out" / "run.json").read_text())["method"]
    values = dict.fromkeys(variables_read() - LET_THROUGH.keys() - set(OTHER_WAYS), "true")
    values |= {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
        "ACCELERATE_DYNAMO_BACKEND": "eager",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "PMI_SIZE": "2",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    config = config.changed(output_dir=str(tmp_path / "again"))
    with pytest.warns(UserWarning, match="not read; the YAML alone decides") as caught:
        found = adapter(train(config))
    said = [str(one.message) for one in caught if "the YAML alone decides" in str(one.message)]
    assert len(said) == 1
    assert all(name in said[0] for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "WORLD_SIZE"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((tmp_path / "again" / "run.json").read_text())["method"] == record
    assert {name: os.environ[name] for name in values} == values  # they are the user's, and are there again


@pytest.mark.parametrize("name", OTHER_WAYS)
@pytest.mark.parametrize("value", ["true", "1", "True"])
def test_another_way_to_train_is_refused_before_anything_is_written(config, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=rf"environment variable {name} is '{value}': .*; unset it"):
        train(config)
    assert not Path(config.output_dir).exists()


def test_what_agrees_with_the_yaml_or_says_nothing_is_not_mentioned(config, monkeypatch):
    """What `accelerate launch` sets for a plain run."""
    plain = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_USE_CPU": str(not torch.cuda.is_available()),
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    }
    for name, value in plain.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_arguments(config, 2)


def test_what_is_harmless_stays(monkeypatch):
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "info")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with without_back_doors():
        assert os.environ["ACCELERATE_LOG_LEVEL"] == "info"
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment.back_doors({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == {}

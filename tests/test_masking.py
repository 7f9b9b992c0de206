"""No secret in what a run writes about itself."""

from __future__ import annotations

import pytest

from dataflex import load_config
from dataflex.commands.session import session
from dataflex.config import save_config
from dataflex.masking import masked
from dataflex.origin import origin


def test_secret_keys_and_credentials_are_masked_wherever_they_are():
    value = {
        "hub_token": "hf_abc",
        "nested": [{"WANDB_API_KEY": "k", "client_secret": "s", "password": ""}],
        "model": "https://me:hf_abc@host/a@b",
        "several": ["git+https://hf_abc@host", "s3://bucket/x"],
        "token_budget": 7,
        "template": "qwen",
    }
    assert masked(value) == {
        "hub_token": "***",
        "nested": [{"WANDB_API_KEY": "***", "client_secret": "***", "password": ""}],
        "model": "https://***@host/a@b",
        "several": ["git+https://***@host", "s3://bucket/x"],
        "token_budget": 7,
        "template": "qwen",
    }


def test_no_secret_in_config_yaml_and_run_json(tmp_path):
    config = load_config(options={"model_name_or_path": "https://me:hf_abc@host/model", "run_name": "plain"})
    save_config(config, tmp_path / "config.yaml")
    assert "hf_abc" not in (tmp_path / "config.yaml").read_text()
    facts = {"base_model": {"model_name_or_path": config.model_name_or_path}}
    assert "hf_abc" not in str(origin(config, "train", {}, facts))
    assert "plain" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("trusts", [True, False])
def test_code_that_comes_with_a_model_is_named_when_it_is_run(capsys, trusts):
    options = {"model_name_or_path": "some/model", "trust_remote_code": trusts}
    with session(None, options, as_json=False, quiet=False):
        pass
    assert ("trust_remote_code: the code that some/model brings is run" in capsys.readouterr().err) is trusts

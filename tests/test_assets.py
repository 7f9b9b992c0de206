"""What set-up delivers: the fetched model and data, and a package list that leaves nothing out.

No network: archives are small ones made here, or taken from a folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from dataflex.errors import DataflexError


@pytest.fixture(scope="module")
def assets(repo: Path) -> ModuleType:
    """examples/fetch_assets.py as a module."""
    spec = importlib.util.spec_from_file_location("fetch_assets", repo / "examples" / "fetch_assets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_script(repo: Path, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo / "examples" / "fetch_assets.py"), *map(str, args)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def make_archive(assets: ModuleType, folder: Path, suffix: str, content: bytes) -> tuple[Path, object]:
    """A one-file archive of the given kind, and its entry in the table."""
    path, source = folder / f"pack{suffix}", folder / "inside.json"
    source.write_bytes(content)
    if suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.write(source, "pack/inside.json")
    else:
        with tarfile.open(path, "w:gz") as tar:
            tar.add(source, "pack/inside.json")
    member = assets.Member("pack/inside.json", "data/inside.json", hashlib.sha256(content).hexdigest())
    return path, assets.Archive("pack==1", path.name, assets.sha256_of(path), (), (member,))


def test_a_second_run_changes_nothing_and_needs_no_torch(
    repo: Path, data_dir: Path, model_dir: Path, gguf_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    files = [*data_dir.glob("*.json*"), gguf_file, *model_dir.iterdir()]
    before = {path: path.stat().st_mtime_ns for path in files}

    done = run_script(repo, PYTHONPATH=str(tmp_path))

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12 and all(line.endswith(": there") for line in lines), done.stdout
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_the_held_out_rows_are_the_last_of_their_dataset(data_dir: Path) -> None:
    rows = json.loads((data_dir / "glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
    held_out = (data_dir / "toolcall_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in held_out] == rows[-10:]


def test_quiet_says_nothing_when_nothing_is_to_do(repo: Path, model_dir: Path) -> None:
    done = run_script(repo, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_wrong_archive_is_refused(repo: Path, assets: ModuleType, tmp_path: Path) -> None:
    archives, root = tmp_path / "archives", tmp_path / "root"
    archives.mkdir()
    for archive in assets.ARCHIVES:
        (archives / archive.name).write_bytes(b"something else")

    done = run_script(repo, "--archives", archives, "--root", root)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "wanted" in done.stderr
    assert assets.ARCHIVES[0].name in done.stderr and assets.ARCHIVES[0].sha256 in done.stderr
    assert not root.exists()


def test_a_missing_archive_is_named_with_the_command_that_gets_it(repo: Path, tmp_path: Path) -> None:
    done = run_script(repo, "--archives", tmp_path, "--root", tmp_path / "root")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "pip download --no-deps" in done.stderr


def test_without_a_network_one_line_says_what_to_do(repo: Path, tmp_path: Path) -> None:
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = run_script(repo, "--root", tmp_path / "root", **offline)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "llamafactory==0.9.5" in done.stderr and "--archives" in done.stderr


@pytest.mark.parametrize("suffix", [".whl", ".tar.gz"])
def test_half_a_file_does_not_count(assets: ModuleType, tmp_path: Path, suffix: str) -> None:
    content = json.dumps([{"instruction": "a"}] * 100).encode()
    _, archive = make_archive(assets, tmp_path, suffix, content)
    target = tmp_path / "root" / "data" / "inside.json"
    target.parent.mkdir(parents=True)
    target.write_bytes(content[:50])

    assets.fetch_members(archive, tmp_path / "root", tmp_path, lambda line: None)

    assert target.read_bytes() == content
    assert target.with_name("inside.json.bak").read_bytes() == content[:50]  # could have been an edit
    assert sorted(path.name for path in target.parent.iterdir()) == ["inside.json", "inside.json.bak"]


def test_a_member_with_a_wrong_hash_never_appears(assets: ModuleType, tmp_path: Path) -> None:
    path, _ = make_archive(assets, tmp_path, ".whl", b"[]")
    target = tmp_path / "root" / "inside.json"
    target.parent.mkdir()
    target.write_bytes(b"before")
    wrong = assets.Member("pack/inside.json", "inside.json", "0" * 64)
    with pytest.raises(DataflexError, match="wanted 0000"):
        assets.extract(path, wrong, target)
    with pytest.raises(DataflexError, match="holds no"):
        assets.extract(path, assets.Member("pack/other.json", "inside.json", "0" * 64), target)
    assert [item.name for item in target.parent.iterdir()] == ["inside.json"]
    assert target.read_bytes() == b"before"


def test_a_model_directory_counts_only_when_whole(assets: ModuleType, model_dir: Path, tmp_path: Path) -> None:
    assert assets.is_converted(model_dir)
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model_dir.iterdir():
        os.symlink(path, copy / path.name)
    assert assets.is_converted(copy)

    (copy / "config.json").unlink()
    assert not assets.is_converted(copy)
    shutil.copyfile(model_dir / "config.json", copy / "config.json")
    assert assets.is_converted(copy)
    (copy / "config.json").write_text("{")
    assert not assets.is_converted(copy)
    assert not assets.is_converted(tmp_path / "nothing")


def test_the_saved_model_has_the_weights_of_the_gguf(model_dir: Path, gguf_file: Path) -> None:
    """Against the gguf package's own unpacking: an oracle that shares no code with transformers' loader."""
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import load_file

    saved = load_file(model_dir / "model.safetensors")
    packed = {tensor.name: tensor for tensor in GGUFReader(gguf_file).tensors}
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
        ("blk.29.attn_output", "model.layers.29.self_attn.o_proj"),
    ):
        tensor = packed[f"{theirs}.weight"]
        weight = saved[f"{ours}.weight"]
        assert weight.dtype == np.float32
        assert np.array_equal(weight, dequantize(tensor.data, tensor.tensor_type))


def test_the_saved_model_loads_plainly_and_answers(model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "quantization_config" not in json.loads((model_dir / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_every_package_is_installed(repo: Path) -> None:
    """pyproject.toml names packages one by one, so a new folder must be added there."""
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(repo) for path in (repo / "dataflex").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} | {"dataflex.commands"} == listed


def test_every_other_file_is_installed(repo: Path) -> None:
    """py.typed, which says that the package has type hints, and whatever else is no module."""
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["package-data"]["dataflex"])
    others = {
        str(path.relative_to(repo / folder))
        for folder in ("dataflex", "commands")
        for path in (repo / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert "py.typed" in others and others == listed

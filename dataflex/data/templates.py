"""Chat templates by LLaMA-Factory's names: one table, and the renderer that turns a conversation into token turns.

A slot is a tuple of parts: a text in which `{{content}}` stands for the turn's content, or BOS or EOS for
the tokenizer's own token. Each part is encoded by itself with no special tokens added, as LLaMA-Factory
does, so the ids are the same to the last one.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from dataflex.data.conversations import ASSISTANT, FUNCTION, OBSERVATION, USER, Conversation
from dataflex.data.tools import function_text, tool_prompt
from dataflex.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Special(Enum):
    """A token that each tokenizer names for itself; left out where it has none."""

    BOS = "bos_token_id"
    EOS = "eos_token_id"


BOS, EOS = Special.BOS, Special.EOS
Slot = tuple[str | Special, ...]
Turn = tuple[list[int], list[int]]  # token ids of a prompt and of the response to it

CONTENT = "{{content}}"


@dataclass(frozen=True)
class Template:
    """The wording of a chat. `function` words a turn's calls in `tool_format`, which also words the tools on offer."""

    user: Slot = (CONTENT,)
    assistant: Slot = (CONTENT, EOS)
    system: Slot = (CONTENT,)
    function: Slot | None = None  # as assistant
    observation: Slot | None = None  # as user
    prefix: Slot = ()
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    replace_eos: bool = False  # the first stop word becomes the tokenizer's eos
    efficient_eos: bool = False  # turns end without a token, the row ends with eos
    tool_format: str = "default"
    system_in_user: bool = False  # the system text opens the first user turn


_IM_USER = "<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"
_IM_TOOL = "<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n"
_IM_TOOL_RESPONSE = (
    "<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
_IM_SYSTEM = "<|im_start|>system\n{{content}}<|im_end|>\n"
_IM_ASSISTANT = "{{content}}<|im_end|>\n"
_IM = {"user": (_IM_USER,), "assistant": (_IM_ASSISTANT,), "system": (_IM_SYSTEM,), "stop_words": ("<|im_end|>",)}
_LLAMA3_ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_GEMMA = {
    "user": ("<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
    "assistant": ("{{content}}<end_of_turn>\n",),
    "system": ("{{content}}\n\n",),
    "observation": ("<start_of_turn>tool\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
    "prefix": (BOS,),
    "system_in_user": True,
}

TEMPLATES: dict[str, Template] = {
    "alpaca": Template(
        user=("### Instruction:\n{{content}}\n\n### Response:\n",),
        assistant=(CONTENT, EOS, "\n\n"),
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    "chatml": Template(
        **{**_IM, "stop_words": ("<|im_end|>", "<|im_start|>")}, observation=(_IM_TOOL,), replace_eos=True
    ),
    "deepseek": Template(user=("User: {{content}}\n\nAssistant:",), system=("{{content}}\n\n",), prefix=(BOS,)),
    "default": Template(
        user=("Human: {{content}}", EOS, "\nAssistant:"),
        assistant=(CONTENT, EOS, "\n"),
        system=("System: {{content}}", EOS, "\n"),
    ),
    "empty": Template(assistant=(CONTENT,)),
    "falcon": Template(user=("User: {{content}}\nFalcon:",), assistant=("{{content}}\n",), efficient_eos=True),
    "gemma": Template(**_GEMMA, stop_words=("<end_of_turn>",), replace_eos=True),
    "gemma2": Template(**_GEMMA, stop_words=("<eos>", "<end_of_turn>"), efficient_eos=True),
    "llama2": Template(
        user=(BOS, "[INST] {{content}} [/INST]"), system=("<<SYS>>\n{{content}}\n<</SYS>>\n\n",), system_in_user=True
    ),
    "llama3": Template(
        user=("<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|>" + _LLAMA3_ASSISTANT,),
        assistant=("{{content}}<|eot_id|>",),
        system=("<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>",),
        observation=("<|start_header_id|>ipython<|end_header_id|>\n\n{{content}}<|eot_id|>" + _LLAMA3_ASSISTANT,),
        prefix=(BOS,),
        stop_words=("<|eot_id|>", "<|eom_id|>"),
        replace_eos=True,
        tool_format="llama3",
    ),
    "mistral": Template(
        user=("[INST] {{content}}[/INST]",),
        assistant=(" {{content}}", EOS),
        system=("{{content}}\n\n",),
        function=("[TOOL_CALLS] {{content}}", EOS),
        observation=('[TOOL_RESULTS] {"content": {{content}}}[/TOOL_RESULTS]',),
        prefix=(BOS,),
        tool_format="mistral",
        system_in_user=True,
    ),
    "phi": Template(
        user=("<|user|>\n{{content}}<|end|>\n<|assistant|>\n",),
        assistant=("{{content}}<|end|>\n",),
        system=("<|system|>\n{{content}}<|end|>\n",),
        stop_words=("<|end|>",),
        replace_eos=True,
    ),
    "qwen": Template(
        **_IM,
        observation=(_IM_TOOL_RESPONSE,),
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        replace_eos=True,
        tool_format="qwen",
    ),
    "qwen3_nothink": Template(**_IM, observation=(_IM_TOOL_RESPONSE,), replace_eos=True, tool_format="qwen"),
    "smollm": Template(**_IM),
    "smollm2": Template(**_IM, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "vicuna": Template(
        user=("USER: {{content}} ASSISTANT:",),
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "yi": Template(**_IM),
    "zephyr": Template(
        user=("<|user|>\n{{content}}", EOS, "<|assistant|>\n"),
        system=("<|system|>\n{{content}}", EOS),
        default_system="You are Zephyr, a helpful assistant.",
    ),
}


def find_template(name: str) -> Template:
    """The template of that name; a UsageError lists the choices otherwise."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    close = difflib.get_close_matches(name, list(TEMPLATES), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UsageError(
        f"template {name!r} is unknown; {hint}There are {', '.join(TEMPLATES)}. "
        "Leave `template` out to use the tokenizer's own chat template"
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: Template | None) -> None:
    """Give the tokenizer the eos, pad and stop tokens `template` needs, in place; None needs a pad token only.

    A token the vocabulary lacks is added, as LLaMA-Factory does, and a warning says so: the model has no
    embedding for it.
    """
    known = len(tokenizer)
    stop_words = list(template.stop_words) if template else []
    if template and template.replace_eos:
        _set_eos(tokenizer, stop_words.pop(0))
    if tokenizer.eos_token_id is None:
        _set_eos(tokenizer, "<|endoftext|>")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if stop_words:
        tokenizer.add_tokens(stop_words, special_tokens=True)
    if len(tokenizer) > known:
        added = tokenizer.convert_ids_to_tokens(list(range(known, len(tokenizer))))
        warnings.warn(
            f"the tokenizer lacks {', '.join(added)}, which the template uses; added as ids from {known} on. "
            f"A model with {known} embeddings cannot run on them: choose the template made for the model",
            stacklevel=2,
        )


def encode_turns(template: Template, tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[Turn]:
    """Token ids of each (prompt, response) of a conversation; the first prompt opens with prefix and system text.

    Raises:
        Unusable: tools or function calls that cannot be worded.
    """
    encoded = []
    for place, message in enumerate(conversation.messages):
        opening: Slot = ()
        content = message.content
        if place == 0:
            system = _system_slot(template, conversation)
            if template.system_in_user:
                opening, content = template.prefix, "".join(system[:1]) + content
            else:
                opening = template.prefix + system
        encoded.append(_encode(tokenizer, opening + _worded(template, message.role, content)))
    return list(zip(encoded[::2], encoded[1::2], strict=True))


def _set_eos(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    if tokenizer.eos_token != token:
        tokenizer.add_special_tokens({"eos_token": token})


def _system_slot(template: Template, conversation: Conversation) -> Slot:
    """The system turn, worded; () where there is nothing to say."""
    system = conversation.system or template.default_system
    if conversation.tools:
        return _fill(template.system, system + tool_prompt(template.tool_format, conversation.tools))
    return _fill(template.system, system) if system else ()


def _worded(template: Template, role: str, content: str) -> Slot:
    if role == FUNCTION:
        # Where the system text opens the user turn, LLaMA-Factory reads a call's JSON alone.
        content = function_text(template.tool_format, content, with_remarks=not template.system_in_user)
    slots = {
        USER: template.user,
        ASSISTANT: template.assistant,
        OBSERVATION: template.observation or template.user,
        FUNCTION: template.function or template.assistant,
    }
    return _fill(slots[role], content)


def _fill(slot: Slot, content: str) -> Slot:
    return tuple(part.replace(CONTENT, content, 1) if isinstance(part, str) else part for part in slot)


def _encode(tokenizer: PreTrainedTokenizerBase, slot: Slot) -> list[int]:
    ids: list[int] = []
    for part in slot:
        if isinstance(part, str):
            ids += tokenizer.encode(part, add_special_tokens=False) if part else []
        elif (token := getattr(tokenizer, part.value)) is not None:
            ids.append(token)
    return ids

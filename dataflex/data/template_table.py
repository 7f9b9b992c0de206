"""The chat templates by LLaMA-Factory's names, as data: what each puts around a turn's content.

A slot is a tuple of parts: a text in which `{{content}}` stands for the turn's content, or BOS or EOS for
the tokenizer's own token. Each part is encoded by itself with no special tokens added, as LLaMA-Factory
does, so the ids are the same to the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

CONTENT = "{{content}}"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


class Special(Enum):
    """A special token that each tokenizer names. A tokenizer without the token leaves it out."""

    BOS = "bos_token_id"
    EOS = "eos_token_id"


BOS, EOS = Special.BOS, Special.EOS
Slot = tuple[str | Special, ...]


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
    thinks: bool = False  # a response without a thought gets an empty one


_IM_USER = "<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"
_IM_TOOL = "<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n"
_IM_TOOL_RESPONSE = (
    "<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
_IM_SYSTEM = "<|im_start|>system\n{{content}}<|im_end|>\n"
_IM_ASSISTANT = "{{content}}<|im_end|>\n"
_IM: dict[str, Any] = {
    "user": (_IM_USER,),
    "assistant": (_IM_ASSISTANT,),
    "system": (_IM_SYSTEM,),
    "stop_words": ("<|im_end|>",),
}
_QWEN3: dict[str, Any] = {**_IM, "observation": (_IM_TOOL_RESPONSE,), "replace_eos": True, "tool_format": "qwen"}
_LLAMA3_ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_GEMMA: dict[str, Any] = {
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
    "deepseek3": Template(user=("<｜User｜>{{content}}<｜Assistant｜>",), prefix=(BOS,)),
    "deepseekr1": Template(user=("<｜User｜>{{content}}<｜Assistant｜>",), prefix=(BOS,), thinks=True),
    "default": Template(
        user=("Human: {{content}}", EOS, "\nAssistant:"),
        assistant=(CONTENT, EOS, "\n"),
        system=("System: {{content}}", EOS, "\n"),
    ),
    "empty": Template(assistant=(CONTENT,)),
    "falcon": Template(user=("User: {{content}}\nFalcon:",), assistant=("{{content}}\n",), efficient_eos=True),
    "gemma": Template(**_GEMMA, stop_words=("<end_of_turn>",), replace_eos=True),
    "gemma2": Template(**_GEMMA, stop_words=("<eos>", "<end_of_turn>"), efficient_eos=True),
    "gemma3": Template(**_GEMMA, stop_words=("<end_of_turn>",), replace_eos=True),
    "glm4": Template(
        user=("<|user|>\n{{content}}<|assistant|>",),
        assistant=("\n{{content}}",),
        system=("<|system|>\n{{content}}",),
        function=(CONTENT,),
        observation=("<|observation|>\n{{content}}<|assistant|>",),
        prefix=("[gMASK]<sop>",),
        stop_words=("<|user|>", "<|observation|>"),
        efficient_eos=True,
        tool_format="glm4",
    ),
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
    "phi4": Template(
        user=("<|im_start|>user<|im_sep|>{{content}}<|im_end|><|im_start|>assistant<|im_sep|>",),
        assistant=("{{content}}<|im_end|>",),
        system=("<|im_start|>system<|im_sep|>{{content}}<|im_end|>",),
        stop_words=("<|im_end|>",),
        replace_eos=True,
    ),
    "qwen": Template(
        **_IM,
        observation=(_IM_TOOL_RESPONSE,),
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        replace_eos=True,
        tool_format="qwen",
    ),
    "qwen3": Template(**_QWEN3, thinks=True),
    "qwen3_nothink": Template(**_QWEN3),
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

# Templates whose wording is nobody's default: a tokenizer's own chat template gives way to them, as in LLaMA-Factory.
REPLACING = ("alpaca", "chatml", "default", "vicuna")

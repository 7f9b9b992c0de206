"""A chat template in the words of other tools: Jinja for tokenizers, Go's template language for Ollama.

Both word system, user and assistant turns, as LLaMA-Factory's do; tools are left to the caller's own prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dataflex.data.template_table import BOS, CONTENT, Slot, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_token(template: Template | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The special token that ends a response in training; None where a response ends without one."""
    if template is not None and template.efficient_eos:
        return tokenizer.eos_token
    said = "".join(_texts(template.assistant, tokenizer)) if template is not None else answered(tokenizer)
    after = said.rpartition(CONTENT)[2]
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer.encode(after, add_special_tokens=False) if after else []
    found = next((token for token in ids if token in added), None)
    return None if found is None else str(tokenizer.convert_ids_to_tokens(found))


def answered(tokenizer: PreTrainedTokenizerBase) -> str:
    """A question and an answer in the words of the tokenizer's template; empty where there is no template, or it
    refuses them."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": CONTENT}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a chat template is a program of its own and may raise anything
        return ""


def jinja_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text that a model trained with `template` needs as `tokenizer.chat_template`."""

    def worded(slot: Slot, content: str = "content") -> str:
        parts = []
        for text in _texts(slot, tokenizer):
            before, placeholder, after = text.partition(CONTENT)
            parts += [_quoted(before)] if before else []
            parts += [content] if placeholder else []
            parts += [_quoted(after)] if after else []
        return " + ".join(parts) or "''"

    system = worded(template.system, "system_message")
    lines = []
    if template.prefix:
        lines.append("{{ " + worded(template.prefix) + " }}")
    if template.default_system:
        lines.append("{% set system_message = " + _quoted(template.default_system) + " %}")
    lines.append(
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}"
    )
    if not template.system_in_user:
        lines.append("{% if system_message is defined %}{{ " + system + " }}{% endif %}")
    lines.append("{% for message in loop_messages %}")
    if template.system_in_user:
        lines.append(
            "{% if loop.index0 == 0 and system_message is defined %}"
            "{% set content = " + system + " + message['content'] %}"
            "{% else %}{% set content = message['content'] %}{% endif %}"
        )
    else:
        lines.append("{% set content = message['content'] %}")
    lines.append(
        "{% if message['role'] == 'user' %}{{ " + worded(template.user) + " }}"
        "{% elif message['role'] == 'assistant' %}{{ " + worded(template.assistant) + " }}{% endif %}{% endfor %}"
    )
    return "".join(lines)


def ollama_modelfile(template: Template | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an Ollama Modelfile for the folder that holds it; without a template Ollama uses the tokenizer's."""
    lines = ["# Ollama's description of this model: ollama create NAME -f Modelfile", "", "FROM .", ""]
    stops = [tokenizer.eos_token, end_token(template, tokenizer)]
    if template is not None:

        def worded(slot: Slot, content: str = "") -> str:
            return "".join(_texts(slot, tokenizer)).replace(CONTENT, content)

        wording = (
            worded(template.prefix)
            + "{{ if .System }}" + worded(template.system, "{{ .System }}") + "{{ end }}{{ range .Messages }}"
            + '{{ if eq .Role "user" }}' + worded(template.user, "{{ .Content }}")
            + '{{ else if eq .Role "assistant" }}' + worded(template.assistant, "{{ .Content }}")
            + "{{ end }}{{ end }}"
        )  # fmt: skip
        lines += [f'TEMPLATE """{wording}"""', ""]
        if template.default_system:
            lines += [f'SYSTEM """{template.default_system}"""', ""]
        stops += template.stop_words
    lines += [f'PARAMETER stop "{word}"' for word in dict.fromkeys(stops) if word]
    return "\n".join([*lines, "PARAMETER num_ctx 4096", ""])


def read_template(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The wording of the tokenizer's chat template, found by rendering it; None where rendering does not show it."""
    system, user, answer = ({"role": role, "content": CONTENT} for role in ("system", "user", "assistant"))

    def render(*messages: dict[str, str], prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=False))

    try:
        opening, asked = render(system), render(system, user, prompt=True)
        answered, alone = render(system, user, answer), render(user, prompt=True)
    except Exception:  # a chat template is a program of its own: it may refuse a system turn, and raise anything
        return None
    user_turn = asked.removeprefix(opening)
    before, placeholder, after = opening.partition(CONTENT)
    whole = asked.startswith(opening) and answered.startswith(asked) and alone.endswith(user_turn)
    if not whole or not placeholder or user_turn.count(CONTENT) != 1:
        return None
    template = Template(user=(user_turn,), assistant=(answered.removeprefix(asked),), system=(opening,))
    default = alone.removesuffix(user_turn)  # what stands before the user where no system text is given
    if default.startswith(before) and default.endswith(after) and len(default) > len(before) + len(after):
        return replace(template, default_system=default[len(before) : len(default) - len(after)])
    return template


def _texts(slot: Slot, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A slot's parts as texts; a special token the tokenizer lacks is left out."""
    texts = []
    for part in slot:
        if isinstance(part, str):
            texts.append(part)
        else:
            texts.append((tokenizer.bos_token if part is BOS else tokenizer.eos_token) or "")
    return texts


def _quoted(text: str) -> str:
    """A Jinja string. The backslash goes first; line ends are kept as they are."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

"""A hook of mkdocs (mkdocs.yml): lists every key of RunConfig in place of the mark in docs/keys.md."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from dataflex.key_list import HANDED_ON, KeyFacts, key_facts
from dataflex.keys import COMMANDS

MARK = "<!-- keys -->"


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """mkdocs calls this for every page."""
    return markdown.replace(MARK, keys_as_markdown()) if page.file.src_uri == "keys.md" else markdown


def keys_as_markdown() -> str:
    """Every key a YAML may set: its default, help and users, grouped by what it decides."""
    groups = groupby(key_facts(), lambda facts: facts.heading)
    return "\n\n".join(f"## {heading}\n\n" + "\n".join(map(_of_key, facts)) for heading, facts in groups)


def _of_key(facts: KeyFacts) -> str:
    used = "every command" if set(facts.used_by) == set(COMMANDS) else ", ".join(facts.used_by)
    if facts.help == HANDED_ON:
        return f"- **`{facts.key}`**: {HANDED_ON}. *{used}*"
    default = json.dumps(facts.default, ensure_ascii=False)
    return f"- **`{facts.key}`** (`{default}`): {facts.help} *{used}*"

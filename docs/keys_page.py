"""A hook of mkdocs (mkdocs.yml): lists every key of RunConfig in place of the mark in docs/keys.md."""

from __future__ import annotations

import json
from typing import Any

from dataflex.config import MARKS, RunConfig, default_of, help_of
from dataflex.keys import COMMANDS, Decides

MARK = "<!-- keys -->"

# Heading of each part of a result that keys decide, in the order of the work.
HEADINGS = {
    Decides.ROWS: "Which rows, and their tokens",
    Decides.MODEL: "The base model",
    Decides.TRAINING: "Training",
    Decides.DIRECTION: "The direction of a row",
    Decides.PROJECTION: "The projection",
    Decides.STORE: "Stored numbers",
    Decides.SCORES: "Scores",
    Decides.SELECTION: "Which scored rows are written",
    Decides.MERGE: "Merging",
    Decides.EVALUATION: "Evaluating",
    Decides.COMPARISON: "Comparing",
    Decides.NOTHING: "How the work is done; results stay the same",
}


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """mkdocs calls this for every page."""
    return markdown.replace(MARK, keys_as_markdown()) if page.file.src_uri == "keys.md" else markdown


def keys_as_markdown() -> str:
    """Every key a YAML may set: its default, help and users, grouped by what it decides."""
    parts = []
    for decides, heading in HEADINGS.items():
        keys = [key for key, mark in MARKS.items() if mark.decides is decides and key != "training_arguments"]
        parts.append(f"## {heading}\n\n" + "\n".join(_of_key(key) for key in keys))
    return "\n\n".join(parts)


def _of_key(key: str) -> str:
    users = MARKS[key].users
    used = "every command" if set(users) == set(COMMANDS) else ", ".join(users)
    if key not in RunConfig.model_fields:
        return f"- **`{key}`**: handed to transformers' TrainingArguments as it stands. *{used}*"
    default = json.dumps(default_of(key), ensure_ascii=False)
    return f"- **`{key}`** (`{default}`): {help_of(key)} *{used}*"

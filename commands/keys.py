"""`dataflex keys`"""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import asdict
from typing import Annotated

import typer

from dataflex.commands import session as s

EXAMPLE = "Example: dataflex keys learning_rate"

Word = Annotated[str | None, typer.Argument(metavar="WORD", help="Show keys with this word in name or help.")]


def keys(
    word: Word = None,
    dry_run: s.DryRun = False,
    as_json: s.Json = False,
    quiet: s.Quiet = False,
    overwrite: s.Overwrite = False,
) -> None:
    """List every key, with its default, help and users.

    Each is set in the YAML as `key: value`, or on the command line as key=value.
    """
    with s.session(None, {}, as_json=as_json, quiet=quiet) as session:
        from dataflex.key_list import key_facts

        found = key_facts(word)
        # a terminal would break words; where there is none, each key's help is one line for grep
        width = session.console.err.width if session.console.out.isatty() else sys.maxsize
        wrapper = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False)
        wrapper.initial_indent = wrapper.subsequent_indent = "    "
        lines, heading = [], ""
        for facts in found:
            if facts.heading != heading:
                heading = facts.heading
                lines.append(f"# {heading}")
            lines.append(f"{facts.key}: {json.dumps(facts.default, ensure_ascii=False)}")
            text = f"{facts.help} [{', '.join(facts.used_by)}]"
            lines += wrapper.wrap(text)
        session.console.result(lines, {"command": "keys", "keys": [asdict(facts) for facts in found]})

"""`--help` of a command, on one screen, and `--help-all`, which adds every key that the command uses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from typer.core import TyperArgument, TyperCommand

from dataflex.commands import completion
from dataflex.commands.help_lines import help_console, print_lines
from dataflex.commands.session import KEYS
from dataflex.config import MARKS, RunConfig, default_of, help_of
from dataflex.key_list import KeyFacts, key_facts
from dataflex.keys import Decides

ALL = "--help-all"
HELP = ["-h", "--help", ALL]
LAST = "Files and running"
TOPICS = {
    Decides.MODEL: "Model and rows",
    Decides.ROWS: "Model and rows",
    Decides.TRAINING: "Training",
    Decides.DIRECTION: "Gradients",
    Decides.PROJECTION: "Gradients",
    Decides.STORE: "Gradients",
    Decides.SCORES: "Scores and selection",
    Decides.SELECTION: "Scores and selection",
    Decides.MERGE: "Merging",
    Decides.EVALUATION: "Evaluating",
    Decides.COMPARISON: "Comparing",
    Decides.NOTHING: LAST,
}
"""The topic of an option, by what its key decides, in the order of the help."""
TOPIC_OF = {"component_name": TOPICS[Decides.SCORES]}
"""The topics of options whose keys decide nothing by themselves."""
LINE = 62  # characters of an option's text that fit on its line


class Command(TyperCommand):
    """A command whose help is grouped by topic, and which knows keys that were written as options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print usage, sentences, arguments and options by topic, the example; for ALL every key as well."""
        whole = ctx.meta[ALL]
        console = help_console()
        console.print(" ".join(["Usage: dataflex", str(self.name), *self.collect_usage_pieces(ctx)]), markup=False)
        for paragraph in (self.help or "").split("\n\n"):
            console.print("\n" + " ".join(paragraph.split()), markup=False)
        console.print()
        for topic, lines in _options(self.get_params(ctx), whole=whole).items():
            print_lines(console, topic, lines)
        if whole:
            own = [facts for facts in key_facts() if self.name in facts.used_by]
            for heading in dict.fromkeys(facts.heading for facts in own):
                lines = [(facts.key, _key_text(facts)) for facts in own if facts.heading == heading]
                print_lines(console, f"Keys, as key=value or in the YAML: {heading}", lines)
        console.print(self.epilog or "", markup=False, soft_wrap=True)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, TyperArgument)]
        pieces = [
            str(one.metavar) if one.required or one.name == "arguments" else f"[{one.metavar}]" for one in arguments
        ]
        return [*pieces, "[OPTIONS]"]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ALL] = ALL in args
        options = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        for place, word in enumerate(args):
            name, _, value = word.removeprefix("--").partition("=")
            key = name.replace("-", "_")
            if word == "--":
                break
            if word.startswith("--") and f"--{name}" not in options and key in RunConfig.model_fields:
                value = value or next(iter(args[place + 1 :]), "")
                ctx.fail(f"No such option: --{name}. It is a key, written without dashes: {key}={value}")
        return super().parse_args(ctx, args)


def key_of(parameter: Any) -> str | None:
    """The key that a command's parameter sets."""
    key = KEYS.get(parameter.name, parameter.name)
    return key if key in RunConfig.model_fields else None


def text_of(parameter: Any, key: str | None, *, whole: bool) -> str:
    """An option's help, then its choices and default. Unless `whole` the help ends at its first full stop or semicolon,
    and at a colon where it would not fit on a line."""
    text = parameter.help or "" if key is None else help_of(key)
    if parameter.is_flag:  # to name the option is to say true
        text = text.removeprefix("true: ").partition(" false: ")[0]
    if not whole:
        text = re.split(r"[.;] ", text)[0]
        text = text if len(text) <= LINE else text.split(": ")[0]
    text = f"{text[:1].upper()}{text[1:].removesuffix('.')}"
    if key is None or parameter.is_flag:
        return text
    choices, default = completion.choices(key), default_of(key)
    known = [", ".join(choices)] if choices else []
    if default is not None and default != []:
        known.append(f"default {_written(default)}")
    return f"{text} [{'; '.join(known)}]" if known else text


def _options(parameters: Iterable[Any], *, whole: bool) -> dict[str, list[tuple[str, str]]]:
    """By topic: what is typed, and its help."""
    by_topic: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{topic: [] for topic in TOPICS.values()}}
    for parameter in parameters:
        key = key_of(parameter)
        if isinstance(parameter, TyperArgument):
            if parameter.help:  # the usage says enough of CONFIG.yaml and keys
                by_topic["Arguments"].append((str(parameter.metavar), parameter.help.removesuffix(".")))
        elif ALL in parameter.opts:
            text = f"Show this message; {ALL}: whole texts, and every key"
            by_topic[LAST].append(("--help, -h", text))
        else:
            topic = LAST if key is None else TOPIC_OF.get(key, TOPICS[MARKS[key].decides])
            by_topic[topic].append((", ".join(parameter.opts), text_of(parameter, key, whole=whole)))
    return by_topic


def _key_text(facts: KeyFacts) -> str:
    return f"{facts.help.removesuffix('.')} [default {_written(facts.default)}]"


def _written(value: Any) -> str:
    """A value as a YAML or a command line has it."""
    if isinstance(value, list):
        return ",".join(map(_written, value))
    return str(value) if isinstance(value, str) else json.dumps(value)

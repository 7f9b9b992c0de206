"""How the values of keys are read, before or after pydantic checks their type: lists, shares, texts of numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from pydantic import BeforeValidator

from dataflex.errors import UsageError


def of_table(check: Callable[[str], str]) -> Callable[[str], str]:
    """The check of a table's names, with the error that pydantic gathers."""

    def checked(name: str) -> str:
        try:
            return check(name)
        except UsageError as error:
            raise ValueError(str(error)) from None

    return checked


def comma_list(value: Any) -> Any:
    """`a,b` and [a, b] mean the same; None stays None."""
    if isinstance(value, (str, os.PathLike)):
        return [part.strip() for part in str(value).split(",") if part.strip()]
    return value


def as_shares(value: Any) -> Any:
    """One share, or several as a list or by comma; `5%` is 0.05."""
    parts = [value] if isinstance(value, (int, float)) else comma_list(value)
    return [as_share(part) for part in parts] if isinstance(parts, list) else parts


def trackers(value: Any) -> Any:
    if isinstance(value, str) and "," in value:
        return comma_list(value)
    return "none" if value is None else value


def as_text(value: Any) -> Any:
    """A number, as YAML reads `15`, becomes its text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def or_null(value: Any) -> Any:
    """`null` or `none`, as an option gives it, is None."""
    return None if isinstance(value, str) and value.strip().lower() in ("null", "none") else value


def as_share(value: Any) -> Any:
    """`5%` is 0.05."""
    if isinstance(value, str) and value.strip().endswith("%"):
        with contextlib.suppress(ValueError):
            return float(value.strip().removesuffix("%")) / 100
    return value


def as_numbers(value: Any) -> Any:
    """Texts that are numbers as numbers: YAML reads 1e-1 as a text."""
    if not isinstance(value, dict):
        return value
    return {name: as_number(item) for name, item in value.items()}


def as_number(item: Any) -> Any:
    if not isinstance(item, str):
        return item
    for kind in (int, float):
        try:
            return kind(item)
        except ValueError:
            continue
    return item


def whole_steps(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("expected a whole number of steps, or a share of the run below 1")
    return value if value < 1 else int(value)


def only(supported: str, reason: str) -> BeforeValidator:
    """Say why a key that has several values elsewhere has one here."""

    def check(value: Any) -> Any:
        if value != supported:
            raise ValueError(f"expected {supported}, the one there is ({reason})")
        return value

    return BeforeValidator(check)

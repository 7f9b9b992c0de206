"""Secrets stay out of what a run writes about itself: run.json, config.yaml, manifests."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
SECRET_KEY = re.compile(r"(^|_)(token|api_?key|secret|password)$", re.IGNORECASE)  # not token_budget
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def masked(value: Any, key: str = "") -> Any:
    """A copy of `value` (of JSON's types) without the values of secret keys and the credentials in URLs."""
    if isinstance(value, dict):
        return {name: masked(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner, key) for inner in value]
    if isinstance(value, str):
        return MASK if value and SECRET_KEY.search(key) else CREDENTIALS.sub(f"{MASK}@", value)
    return value

"""Whether a generated answer is the answer of the row."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from importlib.util import find_spec


def exact(answer: str, generated: str) -> bool:
    """Equal but for white space at the ends."""
    return answer.strip() == generated.strip()


def normalised(answer: str, generated: str) -> bool:
    """Equal in letter case, Unicode form, punctuation and white space set aside."""
    return plain_text(answer) == plain_text(generated)


def plain_text(text: str) -> str:
    """`text` in Unicode's form NFKC, case-folded, with a space for each run of white space and without punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(letter).startswith("P") else letter for letter in folded)
    return " ".join(kept.split())


def mathematical(answer: str, generated: str) -> bool | None:
    """The same number or expression, as math-verify reads both texts; None where the answer has none."""
    from math_verify import parse, verify

    wanted = parse(answer)
    return bool(verify(wanted, parse(generated))) if wanted else None


def matches() -> dict[str, Callable[[str, str], bool | None]]:
    """By the name under which a share of matches is told; the mathematical one where math-verify is installed.

    None: the row has no part in that share.
    """
    found: dict[str, Callable[[str, str], bool | None]] = {"exact": exact, "normalised": normalised}
    return {**found, "math": mathematical} if find_spec("math_verify") else found

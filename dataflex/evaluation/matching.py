"""Whether a generated answer is the answer of the row."""

from __future__ import annotations

import unicodedata


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


MATCHES = {"exact": exact, "normalised": normalised}
"""By the name under which a share of matches is told."""

"""What became of the rows of a split, in numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_TURN = re.compile(r"^turn \d+ ")


@dataclass
class Report:
    """What became of the rows of a split."""

    seen: int = 0
    """Rows looked at: all of the files' but those left out by num_samples, max_samples or val_size."""
    kept: int = 0
    """Rows that became examples."""
    truncated: int = 0
    """Kept rows that lost tokens to cutoff_len."""
    lost_end: int = 0
    """Kept rows whose last response lost its end."""
    supervised_tokens: int = 0
    """Tokens that are learned from, over the kept rows."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each kept row."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Row numbers of the rows that cannot be used, by reason."""
    lost: dict[str, list[int]] = field(default_factory=dict)
    """Row numbers of kept rows that say something their tokens do not, by what is lost."""
    left_out: dict[str, list[int]] = field(default_factory=dict)
    """Row numbers of kept rows that are not read whole, by what is not read."""

    def summary(self, name: str) -> str:
        """The counts in one line, with the first row of each reason."""
        parts = [f"{name}: {self.kept} of {self.seen} rows"]
        for reason, rows in by_kind(self.dropped).items():
            parts.append(f"{len(rows)} dropped, {reason} (first: row {rows[0]})")
        if self.truncated:
            parts.append(f"{self.truncated} truncated, {self.lost_end} of them without their end")
        return "; ".join(parts)

    def warnings(self, name: str) -> list[str]:
        """A sentence for each thing that is lost or not read, with the number of rows and the first."""
        return [
            *(
                f"{name}: {what} cannot be found in the tokens of {_counted(rows, self.kept)}; "
                "the template or the tokenizer leaves it out: set another `template`"
                for what, rows in self.lost.items()
            ),
            *(
                f"{name}: not read: {what}, in {_counted(rows, self.kept)}"
                + (
                    "; name it in `columns` if it is meant (naming some unsets the others)"
                    if what.startswith("column ")
                    else ""
                )
                for what, rows in self.left_out.items()
            ),
        ]

    def problems(self) -> list[str]:
        """Why the data is not whole, a phrase for each reason."""
        return [
            *(f"row {rows[0]}: {reason} ({len(rows)} rows so)" for reason, rows in by_kind(self.dropped).items()),
            *(
                f"row {rows[0]}: {what} cannot be found in the tokens ({len(rows)} rows so)"
                for what, rows in self.lost.items()
            ),
        ]

    def length_quantile(self, share: float) -> int:
        """The length that `share` (0 to 1) of the kept rows do not exceed; 0 without rows."""
        if not self.lengths:
            return 0
        return sorted(self.lengths)[max(math.ceil(share * len(self.lengths)), 1) - 1]


def by_kind(dropped: dict[str, list[int]]) -> dict[str, list[int]]:
    """`dropped` with the reasons joined that differ in the turn alone; the first row's stands for them."""
    kinds: dict[str, tuple[str, list[int]]] = {}
    for reason, rows in sorted(dropped.items(), key=lambda item: item[1][0]):
        _, so_far = kinds.setdefault(_TURN.sub("", reason), (reason, []))
        so_far += rows
    return {reason: sorted(rows) for reason, rows in kinds.values()}


def _counted(rows: list[int], kept: int) -> str:
    return f"{len(rows)} of {kept} rows (first: row {rows[0]})"

"""What became of the rows of a split, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


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

    def summary(self, name: str) -> str:
        """The counts in one line, with the first row of each reason."""
        parts = [f"{name}: {self.kept} of {self.seen} rows"]
        for reason, rows in self.dropped.items():
            parts.append(f"{len(rows)} dropped, {reason} (first: row {rows[0]})")
        if self.truncated:
            parts.append(f"{self.truncated} truncated, {self.lost_end} of them without their end")
        return "; ".join(parts)

    def length_quantile(self, share: float) -> int:
        """The length that `share` (0 to 1) of the kept rows do not exceed; 0 without rows."""
        if not self.lengths:
            return 0
        return sorted(self.lengths)[max(math.ceil(share * len(self.lengths)), 1) - 1]

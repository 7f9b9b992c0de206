"""One line: did it help?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def verdict_of_runs(facts: Mapping[str, Any], against: Mapping[str, Any]) -> str:
    """Of two runs of `dynamic`: whose loss on the same validation rows is lower."""
    ours, theirs = facts["eval_loss"], against["eval_loss"]
    mine, its = facts["selector"], against["selector"]
    losses = f"{ours['after']:.4f} after {mine}, {theirs['after']:.4f} after {its}"
    after = f"loss on the {ours['rows']} validation rows {losses}"
    if ours["after"] == theirs["after"]:
        return f"Neither won: {after}."
    winner = mine if ours["after"] < theirs["after"] else its
    return f"{winner} won: {after} ({ours['before']:.4f} before). One seed: `dataflex compare` tells luck apart."


def verdict_of_comparison(facts: Mapping[str, Any]) -> str:
    """Of the arms of a comparison: at each budget the best selector, and whether it is told apart from random rows."""
    lines = []
    for budget in facts["budgets"]:
        own = [one for one in facts["summary"] if one["budget"] == budget and "difference" in one]
        rivals = [one for one in own if one["arm"] not in ("untouched", "all", "length")]
        if not rivals:
            continue
        best = min(rivals, key=lambda one: one["difference"])
        interval = f"{best['difference']:+.4f}, 95% interval {best['low']:+.4f} to {best['high']:+.4f}"
        said = "beats random rows" if best["high"] < 0 else "is not told apart from random rows"
        said = "loses to random rows" if best["low"] > 0 else said
        lines.append(f"At a budget of {budget:g}, {best['arm']} does best and {said} ({interval}).")
    return " ".join(lines)

"""From the losses that a comparison measured to its report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dataflex.comparison.arms import ALL, HALF, RANDOM, TENTHS, UNTOUCHED, Training, part_of_budget, tenth_part
from dataflex.comparison.figures import agreement, datamodeling_score, decile_test, paired_difference
from dataflex.comparison.ready import Comparison

Measured = Mapping[tuple[str, int, str], tuple[Training, np.ndarray]]
"""By arm, seed and part: a training, and the losses [held-out rows] after it."""


def findings(
    ready: Comparison, untouched: np.ndarray, made: Measured, scores: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, Any]:
    """All but what is told of single runs.

    Args:
        untouched: [held-out rows] losses of the model as it is.
        scores: of each selector, by seed, [N] of the pool's rows.
    """
    seeds, config = ready.seeds, ready.config
    found: dict[str, Any] = {
        "command": "compare",
        "by": config.by,
        "budgets": config.budget,
        "seeds": seeds,
        "arms": ready.arms,
        "held_out": {"datasets": config.held_out, "rows": len(untouched)},
        "pool": {"rows": len(ready.rows), "tokens": int(ready.tokens.sum()), "datasets": ready.by_dataset()},
        "untouched": {"loss": float(untouched.mean())},
        "summary": [],
        "agreement": [],
    }
    for share in config.budget:
        part = part_of_budget(share, config.by)
        losses = {name: np.stack([made[name, seed, part][1] for seed in seeds]) for name in scores}
        picks = {name: [made[name, seed, part][0].indices.tolist() for seed in seeds] for name in scores}
        losses[UNTOUCHED] = np.tile(untouched, (len(seeds), 1))
        if ready.with_all:
            losses[ALL] = np.stack([made[ALL, seed, part_of_budget(1.0, "rows")][1] for seed in seeds])
        for name in ready.arms:
            against = {} if name == RANDOM else paired_difference(losses[name], losses[RANDOM])
            found["summary"].append({"arm": name, "budget": share, "loss": float(losses[name].mean()), **against})
        found["agreement"] += [
            {"a": one, "b": other, "budget": share, "share": agreement(picks[one], picks[other])}
            for place, one in enumerate(scores)
            for other in list(scores)[place + 1 :]
        ]
    if config.deciles:
        found["deciles"] = {
            name: decile_test(
                np.array([[made[name, seed, tenth_part(place)][1].mean() for place in range(TENTHS)] for seed in seeds])
            )
            for name in scores
            if (name, seeds[0], tenth_part(0)) in made
        }
    if config.lds:
        found["lds"] = {
            name: [_lds(made, seed, config.lds, of_seed) for seed, of_seed in zip(seeds, of_seeds, strict=True)]
            for name, of_seeds in scores.items()
            if name != RANDOM
        }
    return found


def _lds(made: Measured, seed: int, number: int, scores: np.ndarray) -> float | None:
    halves = [made[HALF, seed, str(place)] for place in range(number)]
    loss = np.array([loss.mean() for _, loss in halves])
    return datamodeling_score(scores, [training.indices for training, _ in halves], loss)

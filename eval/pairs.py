"""Every pair of arms on every task: difference, interval, test, and whether anything is decided."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.eval import statistics
from shoal.eval.tasks.task import ItemScores, Task


@dataclass(frozen=True)
class ArmScores:
    """One arm on one task: scores of each of its trainings."""

    arm: str
    seeds: Sequence[int | None]
    trainings: Sequence[ItemScores]

    @property
    def values(self) -> list[float]:
        """The metric of each training."""
        return [scores.value for scores in self.trainings]

    @property
    def mean(self) -> ItemScores:
        """Scores averaged over trainings, item by item: what to expect of one more training."""
        numerators = np.mean([scores.numerator for scores in self.trainings], axis=0)
        extras = {
            key: float(np.mean([scores.extra[key] for scores in self.trainings]))
            for key in self.trainings[0].extra
        }
        return ItemScores(numerators.tolist(), self.trainings[0].denominator, extras)


def describe_scores(task: Task, scores: ArmScores) -> dict[str, Any]:
    """Return one arm's row of a task: value, interval, and each training's value."""
    mean = scores.mean
    if task.metric == "accuracy":
        interval = statistics.wilson_interval(sum(mean.numerator), len(mean.numerator))
    else:
        interval = statistics.ratio_interval(mean.numerator, mean.denominator)
    trainings = zip(scores.seeds, scores.trainings, strict=True)
    return {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "value": mean.value,
        "ci95": interval.as_list(),
        "n": len(mean.numerator),
        "per_seed": [{"seed": seed, "value": one.value} for seed, one in trainings],
        "spread": statistics.seed_spread(scores.values),
        "without_contaminated": None,
        **({"extra": mean.extra} if mean.extra else {}),
    }


def compare_pairs(task: Task, arms: Sequence[ArmScores]) -> list[dict[str, Any]]:
    """Compare all pairs of arms on one task; p values are adjusted for the number of pairs.

    The spread between seeds is the largest of all arms of the task: with two seeds the ranges of
    the two arms alone call one identical pair in five different, those of four arms one in ten.
    """
    spreads = [statistics.seed_spread(arm.values) for arm in arms]
    spread = max((one for one in spreads if one is not None), default=None)
    pairs = list(itertools.combinations(arms, 2))
    rows = [_compare_two(task, a, b, spread, len(pairs)) for a, b in pairs]
    for row, adjusted in zip(rows, statistics.holm([r["p_value"] for r in rows]), strict=True):
        row["p_holm"] = adjusted
        row["outcome"], row["reason"] = decide(row, task.higher_is_better)
    return rows


def _compare_two(
    task: Task, a: ArmScores, b: ArmScores, spread: float | None, pairs: int
) -> dict[str, Any]:
    mean_a, mean_b = a.mean, b.mean
    differences = (np.asarray(mean_a.numerator) - np.asarray(mean_b.numerator)).tolist()
    single = len(a.trainings) == len(b.trainings) == 1
    if single and task.metric == "accuracy":
        test, p_value = "mcnemar_exact", statistics.mcnemar_p(mean_a.numerator, mean_b.numerator)
    else:
        test, p_value = "sign_flip_permutation", statistics.permutation_p(differences)
    denominator = mean_a.denominator
    return {
        "a": a.arm,
        "b": b.arm,
        "task": task.name,
        "metric": task.metric,
        "difference": mean_a.value - mean_b.value,
        "ci95": statistics.ratio_interval(differences, denominator).as_list(),
        "p_value": p_value,
        "p_holm": p_value,
        "test": test,
        "n": len(differences),
        "detectable_difference": statistics.detectable_difference(differences, denominator, pairs),
        "seed_spread": spread,
        "per_seed": _by_seed(task, a, b),
    }


def _by_seed(task: Task, a: ArmScores, b: ArmScores) -> list[dict[str, Any]]:
    """Compare trainings of equal seed one by one: does every one of them say the same?"""
    theirs = dict(zip(b.seeds, b.trainings, strict=True))
    rows = []
    for seed, ours in zip(a.seeds, a.trainings, strict=True):
        if seed is None or seed not in theirs:
            continue
        row: dict[str, Any] = {"seed": seed, "difference": ours.value - theirs[seed].value}
        if task.metric == "accuracy":
            row["mcnemar_p"] = statistics.mcnemar_p(ours.numerator, theirs[seed].numerator)
        rows.append(row)
    return rows


def decide(row: Mapping[str, Any], higher_is_better: bool) -> tuple[str, str]:
    """Return who is better, or `undecided`, and why.

    A difference counts when the items tell the arms apart (Holm-adjusted p and the interval) and
    it is larger than what another seed alone changes.
    """
    difference, spread = row["difference"], row["seed_spread"]
    if row["p_holm"] > statistics.ALPHA:
        return "undecided", f"the items do not tell them apart (p = {row['p_holm']:.2g})"
    if row["ci95"][0] <= 0 <= row["ci95"][1]:
        return "undecided", "the 95% interval of the difference holds zero"
    if spread is not None and abs(difference) <= spread:
        return "undecided", f"inside the spread between seeds ({spread:.4f})"
    better = "a" if (difference > 0) == higher_is_better else "b"
    if spread is None:
        return better, "beyond chance over items; the spread between trainings is unknown"
    return better, f"beyond chance over items and the spread between seeds ({spread:.4f})"

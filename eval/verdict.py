"""The verdict: which arm to deploy, whether that is decided, and what the differences are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

METRIC_WORDS = {"bits_per_byte": "bits per byte", "accuracy": "accuracy"}
UNIGRAM_MARGIN = 0.10


def reach_verdict(
    arms: Sequence[Row], pairs: Sequence[Row], references: Sequence[Row], primary_task: str
) -> dict[str, Any]:
    """Judge the arms on the primary task.

    An arm off its budget cannot win. The winner is better than every other arm beyond chance over
    items and beyond the spread between seeds; otherwise the outcome is undecided, and among the
    arms nothing is shown to beat, the one cheapest to run is named for deployment.

    Args:
        arms: The report's arms.
        pairs: The report's pairs.
        references: The report's reference rows.
        primary_task: Task whose metric decides.
    """
    eligible = [arm for arm in arms if arm["matched"]["within"]]
    off_budget = [arm["name"] for arm in arms if not arm["matched"]["within"]]
    decided = [pair for pair in pairs if pair["task"] == primary_task]
    unbeaten = [arm for arm in eligible if not _beaten_by(arm["name"], eligible, decided)]
    leader = _leader(unbeaten, primary_task)
    deploy = min(unbeaten, key=_running_cost, default=None)
    winner = None
    if leader and all(_beats(leader, arm, decided) for arm in eligible if arm is not leader):
        winner = deploy = leader
    outcome = "none" if leader is None else "winner" if winner else "undecided"
    if len(arms) == 1 and leader:
        outcome = "single"
    verdict = {
        "outcome": outcome,
        "primary_task": primary_task,
        "metric": arms[0]["tasks"][primary_task]["metric"],
        "winner": winner["name"] if winner and outcome == "winner" else None,
        "leader": leader["name"] if leader else None,
        "unbeaten": [arm["name"] for arm in unbeaten],
        "deploy": deploy["name"] if deploy else None,
        "export": deploy["export"] if deploy else None,
        "off_budget": off_budget,
    }
    verdict["headline"] = _headline(verdict, leader)
    verdict["sentences"] = [
        *_deployment(verdict, arms),
        *_worth(eligible, decided, primary_task),
        *_against_references(arms, references, primary_task),
        *_off_budget(arms),
        *_scope(arms),
    ]
    return verdict


def _beaten_by(name: str, arms: Sequence[Row], pairs: Sequence[Row]) -> list[str]:
    """Names of the eligible arms shown to be better than `name`."""
    names = {arm["name"] for arm in arms}
    better = [
        pair[pair["outcome"]]
        for pair in pairs
        if name in (pair["a"], pair["b"]) and pair["outcome"] != "undecided"
    ]
    return [other for other in better if other != name and other in names]


def _beats(arm: Row, other: Row, pairs: Sequence[Row]) -> bool:
    ours = {arm["name"], other["name"]}
    return any(
        {pair["a"], pair["b"]} == ours
        and pair["outcome"] != "undecided"
        and pair[pair["outcome"]] == arm["name"]
        for pair in pairs
    )


def _leader(arms: Sequence[Row], task: str) -> Row | None:
    """Return the arm with the best mean."""
    if not arms:
        return None
    sign = -1 if arms[0]["tasks"][task]["higher_is_better"] else 1
    return min(arms, key=lambda arm: sign * arm["tasks"][task]["value"])


def _running_cost(arm: Row) -> tuple[float, float]:
    """Order by FLOPs per token, arms within 3 % of each other by bytes.

    Logarithmic steps of 3 % make the order total, so that the choice does not depend on the order
    of the arms.
    """
    inference = arm["inference"]
    return round(math.log(inference["flops_per_token"]) / 0.06), inference["bytes_resident"]


def _headline(verdict: Row, leader: Row | None) -> str:
    task, metric = verdict["primary_task"], METRIC_WORDS[verdict["metric"]]
    if leader is None:
        return "No verdict: no arm meets the budget it was built to."
    value = _number(leader["tasks"][task]["value"], verdict["metric"])
    if verdict["outcome"] == "single":
        return f"{leader['name']} reaches {value} {metric} on {task}; there is no other arm."
    if verdict["outcome"] == "winner":
        return (
            f"{leader['name']} wins: {value} {metric} on {task}, better than every other arm "
            "beyond chance and beyond the spread between seeds."
        )
    rivals = [name for name in verdict["unbeaten"] if name != leader["name"]]
    return (
        f"Undecided: {leader['name']} has the best mean ({value} {metric} on {task}), but the "
        f"evidence does not separate it from {_list(rivals)}."
    )


def _deployment(verdict: Row, arms: Sequence[Row]) -> list[str]:
    if verdict["outcome"] in ("none", "single", "winner"):
        return []
    arm = next(a for a in arms if a["name"] == verdict["deploy"])
    megabytes = arm["inference"]["bytes_resident"] / 1e6
    flops = arm["inference"]["flops_per_token"] / 1e6
    return [
        f"Deploy {arm['name']}: of the arms that nothing is shown to beat it is the cheapest to "
        f"run ({flops:,.2f} MFLOPs per token, {megabytes:,.2f} MB resident)."
    ]


def _worth(arms: Sequence[Row], pairs: Sequence[Row], task: str) -> list[str]:
    """Say how large the differences are, and how small a difference could have been seen."""
    names = {arm["name"] for arm in arms}
    inside = [pair for pair in pairs if pair["a"] in names and pair["b"] in names]
    if not inside:
        return []
    metric = inside[0]["metric"]
    widest = max(inside, key=lambda pair: abs(pair["difference"]))
    best = _leader(arms, task)
    assert best is not None
    gap = abs(widest["difference"])
    share = gap / abs(best["tasks"][task]["value"]) if best["tasks"][task]["value"] else 0.0
    sentences = [
        f"The arms lie within {_number(gap, metric)} {METRIC_WORDS[metric]} of each other on "
        f"{task}" + (f", {share:.1%} of the best value." if metric == "bits_per_byte" else ".")
    ]
    seen = [p["detectable_difference"] for p in inside if p["detectable_difference"] is not None]
    if seen:
        sentences.append(
            f"With {inside[0]['n']} items this test shows a true difference of "
            f"{_number(max(seen), metric)} four times out of five; smaller ones mostly stay unseen."
        )
    spreads = [p["seed_spread"] for p in inside if p["seed_spread"] is not None]
    if spreads:
        sentences.append(
            f"Another seed alone moves an arm by up to {_number(max(spreads), metric)}, so "
            "differences below that are not credited to the method."
        )
    else:
        sentences.append(
            "Every arm was trained once: what another seed would have changed is unknown, so a "
            "difference speaks for these exports, not for the method behind them."
        )
    return sentences


def _against_references(arms: Sequence[Row], references: Sequence[Row], task: str) -> list[str]:
    unigram = next((r for r in references if r["name"] == "unigram" and task in r["tasks"]), None)
    if unigram is None or unigram["tasks"][task]["metric"] != "bits_per_byte":
        return []
    floor = unigram["tasks"][task]["value"]
    gains = {arm["name"]: 1 - arm["tasks"][task]["value"] / floor for arm in arms}
    weak = [name for name, gain in gains.items() if gain < UNIGRAM_MARGIN]
    if weak:
        return [
            f"{_list(weak)} learned little: less than {UNIGRAM_MARGIN:.0%} below the unigram "
            f"model ({floor:.4f} bits per byte)."
        ]
    return [
        f"Every arm is at least {min(gains.values()):.0%} below the unigram model "
        f"({floor:.4f} bits per byte)."
    ]


def _off_budget(arms: Sequence[Row]) -> list[str]:
    return [
        f"{arm['name']} is {arm['matched']['deviation']:+.1%} off {arm['matched']['axis']} "
        f"({arm['matched']['budget']}) and cannot win."
        for arm in arms
        if not arm["matched"]["within"]
    ]


def _scope(arms: Sequence[Row]) -> list[str]:
    """Say how far the result reaches."""
    sizes = [arm["parameters"]["total"] for arm in arms]
    tokens = [arm["training"]["tokens"] for arm in arms if arm["training"]["tokens"]]
    trained = f", trained on {_count(min(tokens), max(tokens))} tokens" if tokens else ""
    return [
        f"This holds for models of {_count(min(sizes), max(sizes))} parameters{trained}, on these "
        "tasks. Which method wins changes with size and data; it is no forecast for larger models."
    ]


def _count(low: float, high: float) -> str:
    texts = [_short(low), _short(high)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def _short(value: float) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _number(value: float, metric: str) -> str:
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4f}"


def _list(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names) or "the others"
    return ", ".join(names[:-1]) + " and " + names[-1]

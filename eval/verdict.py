"""The verdict: which arm to deploy, whether that is decided, and what the differences are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.eval.budget import excess
from shoal.eval.words import AXIS_WORDS, METRIC_WORDS, format_count, format_gap, format_score

Row = Mapping[str, Any]

UNIGRAM_MARGIN = 0.10
EQUAL_COST = 0.03


def reach_verdict(
    arms: Sequence[Row], pairs: Sequence[Row], references: Sequence[Row], primary_task: str
) -> dict[str, Any]:
    """Judge the arms on the primary task.

    An arm off its budget cannot win. The winner is better than every other arm beyond chance over
    items and, where it is known, beyond the spread between seeds; otherwise the outcome is
    undecided, and among the arms nothing is shown to beat, the one cheapest to run is named for
    deployment.

    Args:
        arms: The report's arms.
        pairs: The report's pairs.
        references: The report's reference rows.
        primary_task: Task whose metric decides.
    """
    eligible = [arm for arm in arms if arm["matched"]["within"]]
    decided = [pair for pair in pairs if pair["task"] == primary_task]
    verdict = _choose(arms, eligible, decided, primary_task)
    verdict["headline"] = _headline(verdict, arms, decided)
    verdict["sentences"] = [
        *_deployment(verdict, arms),
        *_worth(eligible, decided, primary_task),
        *_against_references(arms, references, primary_task),
        *_against_teachers(arms, references, primary_task),
        *_built_to(arms),
        *_over_other_budgets(verdict, arms),
        *_off_budget(arms),
        *_scope(arms),
    ]
    return verdict


def _choose(
    arms: Sequence[Row], eligible: Sequence[Row], pairs: Sequence[Row], task: str
) -> dict[str, Any]:
    """Return the outcome and the names in it."""
    unbeaten = [arm for arm in eligible if not _beaten_by(arm["name"], eligible, pairs)]
    leader = _leader(unbeaten, task)
    deploy = _cheapest(unbeaten)
    won = leader and all(_beats(leader, arm, pairs) for arm in eligible if arm is not leader)
    if won:
        deploy = leader
    outcome = "none" if leader is None else "winner" if won else "undecided"
    if len(arms) == 1 and leader:
        outcome = "single"
    return {
        "outcome": outcome,
        "primary_task": task,
        "metric": arms[0]["tasks"][task]["metric"],
        "winner": leader["name"] if leader and outcome == "winner" else None,
        "leader": leader["name"] if leader else None,
        "unbeaten": [arm["name"] for arm in unbeaten],
        "deploy": deploy["name"] if deploy else None,
        "export": deploy["export"] if deploy else None,
        "off_budget": [arm["name"] for arm in arms if not arm["matched"]["within"]],
    }


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


def _cheapest(arms: Sequence[Row]) -> Row | None:
    """Return the arm cheapest to run: by FLOPs per token, within 3 % of the lowest by bytes."""
    if not arms:
        return None
    lowest = min(arm["inference"]["flops_per_token"] for arm in arms)
    near = [a for a in arms if a["inference"]["flops_per_token"] <= (1 + EQUAL_COST) * lowest]
    return min(near, key=lambda arm: (arm["inference"]["bytes_resident"], arm["name"]))


def _headline(verdict: Row, arms: Sequence[Row], pairs: Sequence[Row]) -> str:
    task, metric = verdict["primary_task"], METRIC_WORDS[verdict["metric"]]
    leader = next((arm for arm in arms if arm["name"] == verdict["leader"]), None)
    if leader is None:
        if all(arm["matched"]["rule"] == "limit" for arm in arms):
            return "No verdict: no arm keeps within every budget."
        return "No verdict: no arm meets the budget it is held to."
    value = format_score(leader["tasks"][task]["value"], verdict["metric"])
    if verdict["outcome"] == "single":
        return f"{leader['name']} reaches {value} {metric} on {task}; there is no other arm."
    if verdict["outcome"] == "winner":
        return f"{leader['name']} wins: {value} {metric} on {task}, {_proof(verdict, arms, pairs)}"
    rivals = [name for name in verdict["unbeaten"] if name != leader["name"]]
    among = " of the arms within their budgets" if verdict["off_budget"] else ""
    return (
        f"Undecided: {leader['name']} has the best mean{among} ({value} {metric} on {task}), but "
        f"the evidence does not separate it from {_list(rivals)}."
    )


def _proof(verdict: Row, arms: Sequence[Row], pairs: Sequence[Row]) -> str:
    """Say what a winner is better than, and how far the evidence for it reaches."""
    off = set(verdict["off_budget"])
    if len(arms) - len(off) == 1:
        return "the only arm within its budget."
    others = "every other arm within its budget" if off else "every other arm"
    deciding = [
        pair
        for pair in pairs
        if verdict["winner"] in (pair["a"], pair["b"]) and not {pair["a"], pair["b"]} & off
    ]
    if any(pair["seed_spread"] is None for pair in deciding):
        return (
            f"better than {others} beyond chance over items. This holds for these exports: what "
            "other seeds would change is unknown."
        )
    return f"better than {others} beyond chance and beyond the spread between seeds."


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
        f"The arms lie within {format_gap(gap, metric)} {METRIC_WORDS[metric]} of each other on "
        f"{task}" + (f", {share:.1%} of the best value." if metric == "bits_per_byte" else ".")
    ]
    seen = [p["detectable_difference"] for p in inside if p["detectable_difference"] is not None]
    if seen:
        adjusted = f" and p adjusted over {len(pairs)} pairs" if len(pairs) > 1 else ""
        sentences.append(
            f"With {inside[0]['n']} items{adjusted}, a true difference of "
            f"{format_gap(max(seen), metric)} is told from chance over items at least four times "
            "out of five; a smaller one is missed more often."
        )
    spreads = [p["seed_spread"] for p in inside if p["seed_spread"] is not None]
    if spreads:
        counts = [len(arm["tasks"][task]["per_seed"]) for arm in arms]
        seeds = _count(min(counts), max(counts))
        sentences.append(
            f"Another seed alone moves an arm by up to {format_gap(max(spreads), metric)}, the "
            "largest spread of any arm, so differences below that are not credited to the method. "
            f"With {seeds} seed{'s' if seeds != '1' else ''} an arm, the spread is itself "
            "uncertain."
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


def _against_teachers(arms: Sequence[Row], references: Sequence[Row], task: str) -> list[str]:
    """Say of every distilled arm how far its teacher, a reference row, is ahead of it."""
    rows = {row["name"]: row for row in references}
    sentences = []
    for arm in arms:
        teacher = rows.get(arm["teacher"])
        if teacher is None:
            continue
        score = arm["tasks"][task]
        lead = teacher["tasks"][task]["value"] - score["value"]
        if not score["higher_is_better"]:
            lead = -lead
        by = f"{format_gap(lead, score['metric'])} {METRIC_WORDS[score['metric']]} on {task}"
        how = f"better by {by}" if lead > 0 else f"not better: the student is ahead by {by}"
        sentences.append(f"{teacher['name']}, the teacher of {arm['name']}, is {how} (untested).")
    return sentences


def _built_to(arms: Sequence[Row]) -> list[str]:
    """Say which arm was built to which budget, where there are several to be built to."""
    if len(arms[0]["budgets"]) < 2:
        return []
    groups: dict[str, list[str]] = {}
    for arm in arms:
        matched = arm["matched"]
        how = f"built to {matched['budget']}" if matched["rule"] == "match" else "built to none"
        groups.setdefault(how, []).append(arm["name"])
    if list(groups) == ["built to none"]:
        return ["No arm was built to a budget: each of them is a limit for every arm."]
    texts = [f"{_list(names)} {how}" for how, names in groups.items()]
    more = ", and so held to all of them as limits" if "built to none" in groups else ""
    return [f"There are several budgets: {'; '.join(texts)}{more}."]


def _over_other_budgets(verdict: Row, arms: Sequence[Row]) -> list[str]:
    """Say by how much the leader and the arm to deploy exceed budgets they were not built to."""
    sentences = []
    for arm in arms:
        own = arm["matched"]["budget"]
        others = {name: one for name, one in arm["budgets"].items() if name != own}
        over = _exceeded(others)
        named = arm["name"] in (verdict["leader"], verdict["deploy"])
        if named and over and arm["matched"]["rule"] == "match":
            sentences.append(f"{arm['name']}, built to {own} alone, {_list(over)}.")
    return sentences


def _exceeded(budgets: Mapping[str, Row]) -> list[str]:
    """Say for each budget that is not kept by how much it is exceeded."""
    found = []
    for name, one in budgets.items():
        share = excess(one["axis"], one["deviation"])
        if share > 0 and not one["within"]:
            verb = "falls short of" if one["axis"] == "tokens_per_second" else "exceeds"
            axis = "" if name == one["axis"] else f" ({AXIS_WORDS[one['axis']]})"
            found.append(f"{verb} {name}{axis} by {share:.1%}")
    return found


def _off_budget(arms: Sequence[Row]) -> list[str]:
    sentences = []
    for arm in arms:
        matched = arm["matched"]
        if matched["within"]:
            continue
        if matched["rule"] == "limit":
            why = _list(_exceeded(arm["budgets"]))
        else:
            axis = AXIS_WORDS[matched["axis"]]
            why = f"is {matched['deviation']:+.1%} off {axis} ({matched['budget']})"
        sentences.append(f"{arm['name']} {why} and cannot win.")
    return sentences


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
    texts = [format_count(low), format_count(high)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def _list(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names) or "the others"
    return ", ".join(names[:-1]) + " and " + names[-1]

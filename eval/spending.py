"""What arms cost: ledger lines split into what is paid once and what is paid for every domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shoal.eval.inputs import ArmInput

SUMS = ("seconds", "device_seconds", "tokens", "flops")
DOMAINS = (1, 2, 4, 8, 16, 32, 64)
DEPLOYED_TOKENS = tuple(10.0**power for power in range(6, 14))
CURVE_POINTS = 200

Entry = Mapping[str, Any]


def sum_entries(entries: Iterable[Entry], share: float = 1.0) -> dict[str, float]:
    """Sum seconds, device-seconds, tokens and FLOPs of ledger lines, times `share`."""
    listed = list(entries)
    return {key: share * sum(float(entry.get(key, 0)) for entry in listed) for key in SUMS}


def split_ledger(entries: Sequence[Entry]) -> dict[str, dict[str, float]]:
    """Split ledger lines by who pays for them."""
    scopes = ("generic", "specialization")
    return {scope: sum_entries(e for e in entries if e["scope"] == scope) for scope in scopes}


def describe_training(arm: ArmInput) -> dict[str, Any]:
    """Return the `training` block of an arm: one training, the search before it, all it spent."""
    own = [entry for entry in arm.ledger if entry["scope"] == "specialization"]
    runs = [entry for entry in own if entry["kind"] == "train"]
    one = sum_entries(runs, 1 / len(arm.exports))
    tuning = [entry for entry in own if entry["kind"] == "tune"]
    return {
        "equal_on": arm.equal_on,
        "tokens": one["tokens"],
        "flops": one["flops"],
        "device_seconds": one["device_seconds"],
        "trainings": len(arm.exports),
        "tuning": sum_entries(tuning) | {"trials": len({entry["stage"] for entry in tuning})},
        "ledger": split_ledger(arm.ledger),
        "one_domain": _one_domain(arm),
        "curves": [_curve(export.seed, export.metrics) for export in arm.exports],
    }


def _one_domain(arm: ArmInput) -> dict[str, float]:
    """Cost of one more domain: its search, and one training and export instead of one a seed."""
    own = [entry for entry in arm.ledger if entry["scope"] == "specialization"]
    repeated = [entry for entry in own if entry["kind"] in ("train", "export")]
    once = [entry for entry in own if entry["kind"] not in ("train", "export")]
    per_seed, rest = sum_entries(repeated, 1 / len(arm.exports)), sum_entries(once)
    return {key: per_seed[key] + rest[key] for key in SUMS}


def total_ledger(arms: Iterable[ArmInput]) -> dict[str, dict[str, float]]:
    """Return what all arms cost together, stages they share counted once."""
    unique = {
        (entry["kind"], entry["stage"], entry.get("started"), entry.get("seconds")): entry
        for arm in arms
        for entry in arm.ledger
    }
    return split_ledger(list(unique.values()))


def cost_curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Project the cost of each arm over domains and over deployed tokens.

    Args:
        rows: The report's arms; those without a ledger are left out.

    Returns:
        None where no arm has a ledger.
    """
    known = [row for row in rows if row["training"]["one_domain"]["flops"] > 0]
    if not known:
        return None
    by_domains, by_tokens = {}, {}
    for row in known:
        generic = row["training"]["ledger"]["generic"]
        one = row["training"]["one_domain"]
        by_domains[row["name"]] = {
            key: [generic[key] + count * one[key] for count in DOMAINS]
            for key in ("device_seconds", "flops")
        }
        paid, each = generic["flops"] + one["flops"], row["inference"]["flops_per_token"]
        by_tokens[row["name"]] = {"flops": [paid + count * each for count in DEPLOYED_TOKENS]}
    return {
        "domains": list(DOMAINS),
        "by_domains": by_domains,
        "deployed_tokens": list(DEPLOYED_TOKENS),
        "by_deployed_tokens": by_tokens,
        "assumes": "generic cost once, plus for every domain the rate search, one training and "
        "one export as booked here; deployment at the measured FLOPs per token",
    }


def _curve(seed: int | None, records: Sequence[Entry]) -> dict[str, Any]:
    """Thin a run's metrics down to what a plot can show."""
    train = _thin([r for r in records if r.get("kind") == "train"])
    checks = _thin([r for r in records if r.get("kind") == "validation"])
    return {
        "seed": seed,
        "tokens": [r["tokens"] for r in train],
        "loss": [r["loss"] for r in train],
        "validation": {
            "tokens": [r["tokens"] for r in checks],
            "loss": [r["loss"] for r in checks],
            "bits_per_byte": [r.get("bits_per_byte") for r in checks],
        },
    }


def _thin(records: list[Entry]) -> list[Entry]:
    """Keep evenly spaced records, the last one always."""
    if len(records) <= CURVE_POINTS:
        return records
    step = (len(records) - 1) / (CURVE_POINTS - 1)
    return [records[round(i * step)] for i in range(CURVE_POINTS)]

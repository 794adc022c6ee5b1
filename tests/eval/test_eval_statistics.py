"""Statistics agree with published values, with scipy and statsmodels, and with plain counting."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from shoal.eval import statistics
from shoal.eval.pairs import ArmScores, compare_pairs, decide
from shoal.eval.tasks.task import ItemScores


def test_wilson_published_value():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    interval = statistics.wilson_interval(81, 263)
    assert interval.low == pytest.approx(0.2553, abs=5e-5)
    assert interval.high == pytest.approx(0.3662, abs=5e-5)


def test_mcnemar_is_the_exact_sign_test():
    a = [1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0]
    b = [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0]  # discordant: 7 and 1
    expected = scipy_stats.binomtest(7, 8, 0.5).pvalue  # 0.0703125, by hand 2 * 9 / 256
    assert statistics.mcnemar_p(a, b) == pytest.approx(expected)
    assert statistics.mcnemar_p(a, b) == pytest.approx(18 / 256)
    assert statistics.mcnemar_p(a, a) == 1.0


def test_permutation_lists_all_flips_of_few_items():
    given = np.array([0.3, 0.5, -0.1, 0.8, 0.2, 0.4])
    sums = [
        sum(s * d for s, d in zip(signs, given, strict=True))
        for signs in itertools.product((1, -1), repeat=len(given))
    ]
    expected = np.mean([abs(total) >= given.sum() - 1e-12 for total in sums])
    assert statistics.permutation_p(given) == pytest.approx(expected)


def test_permutation_of_right_and_wrong_answers_is_mcnemar():
    differences = [1.0] * 7 + [-1.0] + [0.0] * 20
    assert statistics.permutation_p(differences) == pytest.approx(18 / 256)
    assert statistics.permutation_p([0.0, 0.0]) == 1.0


def test_holm_agrees_with_hand():
    adjusted = statistics.holm([0.01, 0.04, 0.03])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06])
    raw = [0.001, 0.2, 0.01, 0.04]
    assert statistics.holm(raw) == pytest.approx(multipletests(raw, method="holm")[1])
    assert statistics.holm([]) == []


def test_bootstrap_interval_of_ratio_agrees_with_linearisation():
    rng = np.random.default_rng(3)
    size = rng.integers(200, 2000, 400).astype(float)
    bits = size * rng.normal(1.4, 0.1, 400)
    interval = statistics.ratio_interval(bits, size)
    error = statistics.ratio_standard_error(bits, size)
    centre = bits.sum() / size.sum()
    assert interval.low == pytest.approx(centre - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(centre + 1.96 * error, abs=0.15 * error)
    assert statistics.ratio_interval(bits, size) == interval  # seeded


def test_bootstrap_interval_covers_the_truth():
    """95 % intervals of a paired difference hold the true one about 95 times in 100."""
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(60):
        interval = statistics.ratio_interval(rng.normal(0.5, 1.0, 60), np.ones(60))
        covered += interval.low <= 0.5 <= interval.high
    assert 52 <= covered <= 60  # beyond three standard errors either way


def test_interval_of_constant_difference_is_a_point():
    interval = statistics.ratio_interval([2.0, 4.0], [1.0, 2.0])
    assert (interval.low, interval.high) == (2.0, 2.0)


def test_interval_is_finite_for_lone_discordant_item():
    interval = statistics.ratio_interval([1.0] + [0.0] * 9, [1.0] * 10)
    assert math.isfinite(interval.low) and math.isfinite(interval.high)
    assert interval.low <= 0.1 <= interval.high


def test_detectable_difference_has_eighty_percent_power():
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 1, 100)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    difference = statistics.detectable_difference(noise, np.ones(100))
    assert difference == pytest.approx(2.8016 / 10, rel=1e-3)
    found = 0
    for _ in range(400):
        sample = rng.normal(difference, 1.0, 100)
        found += abs(sample.mean() / (sample.std(ddof=1) / 10)) > 1.984
    assert 0.72 < found / 400 < 0.88
    assert statistics.detectable_difference([1.0, 1.0], [1.0, 1.0]) is None


def test_detectable_difference_grows_with_the_pairs_that_p_is_adjusted_for():
    noise = np.random.default_rng(5).normal(0, 1, 100)
    alone, six = (statistics.detectable_difference(noise, np.ones(100), n) for n in (1, 6))
    # (z_(1 - 0.05 / 12) + z_0.8) / (z_0.975 + z_0.8)
    assert six / alone == pytest.approx((2.63826 + 0.84162) / (1.95996 + 0.84162), rel=1e-4)


class BitsTask:
    name, metric, higher_is_better = "text", "bits_per_byte", False


class AccuracyTask:
    name, metric, higher_is_better = "choice", "accuracy", True


def bits_arm(name, offsets, items=80):
    """An arm whose trainings differ from the common items by fixed offsets."""
    rng = np.random.default_rng(0)
    base = rng.normal(100, 10, items)
    noise = np.random.default_rng(len(name)).normal(0, 0.02, items)
    trainings = [
        ItemScores((base + offset + noise).tolist(), [100.0] * items) for offset in offsets
    ]
    return ArmScores(name, list(range(len(offsets))), trainings)


def test_difference_inside_seed_spread_is_undecided():
    a, b = bits_arm("a", [0.0, 3.0]), bits_arm("bb", [1.6, 4.6])
    row = compare_pairs(BitsTask, [a, b])[0]
    assert row["p_holm"] < 0.05  # the items alone would have decided
    assert row["seed_spread"] == pytest.approx(0.03)
    assert row["outcome"] == "undecided"
    assert "spread between seeds" in row["reason"]


def test_difference_beyond_seed_spread_is_decided():
    rows = compare_pairs(BitsTask, [bits_arm("a", [0.0, 0.1]), bits_arm("bb", [2.0, 2.1])])
    assert rows[0]["outcome"] == "a"  # fewer bits are better
    assert rows[0]["difference"] == pytest.approx(-0.02, abs=1e-3)
    three = compare_pairs(BitsTask, [bits_arm(n, [0.0, 0.1]) for n in ("a", "bb", "ccc")])
    assert three[0]["detectable_difference"] > rows[0]["detectable_difference"]
    low, high = rows[0]["ci95"]
    assert low <= rows[0]["difference"] <= high < 0
    assert [one["seed"] for one in rows[0]["per_seed"]] == [0, 1]


def test_accuracy_of_single_trainings_uses_mcnemar():
    right = [1.0] * 30 + [0.0] * 10
    worse = [0.0] * 12 + [1.0] * 18 + [0.0] * 10
    arms = [
        ArmScores("good", [None], [ItemScores(right, [1.0] * 40)]),
        ArmScores("weak", [None], [ItemScores(worse, [1.0] * 40)]),
    ]
    row = compare_pairs(AccuracyTask, arms)[0]
    assert row["test"] == "mcnemar_exact"
    assert row["p_value"] == pytest.approx(2 / 2**12)
    assert row["seed_spread"] is None
    assert row["outcome"] == "a"
    assert "unknown" in row["reason"]


def test_holm_can_undo_a_lone_small_p():
    assert (
        decide({"difference": 0.1, "seed_spread": None, "p_holm": 0.06, "ci95": [0.01, 0.2]}, True)[
            0
        ]
        == "undecided"
    )


def test_seed_spread_of_a_third_arm_counts_for_a_pair():
    """Two seeds of two arms say little about seeds: all arms of the task do together."""
    a, b, wide = bits_arm("a", [0, 0.1]), bits_arm("bb", [2, 2.1]), bits_arm("ccc", [0, 8])
    assert compare_pairs(BitsTask, [a, b])[0]["outcome"] == "a"
    row = compare_pairs(BitsTask, [a, b, wide])[0]
    assert (row["a"], row["b"]) == ("a", "bb")
    assert row["seed_spread"] == pytest.approx(0.08)
    assert row["outcome"] == "undecided"


def test_a_single_difference_decides_nothing() -> None:
    assert statistics.permutation_p([0.0, 0.0, 1.0]) == 1.0
    assert statistics.permutation_p([0.0, 0.0]) == 1.0

"""Paired statistics, thin over scipy and statsmodels.

Every metric is a ratio R = sum(numerator) / sum(denominator) over items; two models are compared
on the same items. All resampling is seeded: the same scores give the same report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4999
SEED = 20260101
CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    def as_list(self) -> list[float]:
        """Return [low, high]."""
        return [self.low, self.high]


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Bootstrap interval (BCa, Efron 1987) of sum(numerator) / sum(denominator) over items.

    For a difference of two models on the same items, pass the differences of their numerators.
    Where BCa is undefined (few items, the value at the edge of its resamples) the percentile
    interval of the same resamples is returned.
    """
    from scipy.stats import bootstrap

    top, bottom = _arrays(numerator, denominator)
    value = float(top.sum() / bottom.sum())
    if len(top) < 2 or np.ptp(top - value * bottom) == 0:  # nothing varies: nothing to resample
        return Interval(value, value)
    found = bootstrap(
        (top, bottom),
        lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(top)),
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(SEED),
    )
    low, high = found.confidence_interval
    if not (math.isfinite(low) and math.isfinite(high)):
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(found.bootstrap_distribution, [tail, 100 - tail])
    return Interval(float(low), float(high))


def wilson_interval(successes: float, count: int) -> Interval:
    """Wilson score interval of a share (Wilson 1927)."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, count, alpha=1 - CONFIDENCE, method="wilson")
    return Interval(float(low), float(high))


def mcnemar_p(correct_a: Sequence[float], correct_b: Sequence[float]) -> float:
    """Exact two-sided McNemar test on two models' right and wrong answers (McNemar 1947)."""
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = _arrays(correct_a, correct_b)
    a_only, b_only = int((a > b).sum()), int((b > a).sum())
    if a_only + b_only == 0:
        return 1.0
    return float(mcnemar([[0, a_only], [b_only, 0]], exact=True).pvalue)


def permutation_p(differences: Sequence[float]) -> float:
    """Two-sided sign-flip permutation test of paired differences summing to zero.

    Exact where all flips can be listed, otherwise over `RESAMPLES` random ones.
    """
    from scipy.stats import permutation_test

    given = np.asarray(differences, dtype=np.float64)
    given = given[given != 0]  # a zero stays zero whichever way it is flipped
    if len(given) < 2:  # one alone is as far from zero flipped as not
        return 1.0
    result = permutation_test(
        (given,),
        lambda x, axis=-1: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(given)),
        rng=np.random.default_rng(SEED),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    return [float(p) for p in multipletests(p_values, alpha=ALPHA, method="holm")[1]]


def detectable_difference(
    numerator: Sequence[float], denominator: Sequence[float], pairs: int = 1
) -> float | None:
    """Smallest true difference these items show with at least 80 % power, p adjusted for `pairs`.

    At the level 0.05 / `pairs`, which Holm asks of the smallest p; of the others it asks less.
    Normal approximation (z of the level + z_0.8) x standard error, the standard error of a ratio by
    linearisation (Cochran 1977, section 2.11). None where a spread cannot be estimated.

    Args:
        numerator: Differences of the two models' numerators, item by item.
        denominator: Denominators, the same for both.
        pairs: Comparisons that p is adjusted for.
    """
    from scipy.stats import norm

    error = ratio_standard_error(numerator, denominator)
    if not error:
        return None
    return float((norm.ppf(1 - ALPHA / pairs / 2) + norm.ppf(POWER)) * error)


def ratio_standard_error(numerator: Sequence[float], denominator: Sequence[float]) -> float | None:
    """Standard error of sum(numerator) / sum(denominator) by linearisation."""
    top, bottom = _arrays(numerator, denominator)
    if len(top) < 2:
        return None
    residuals = top - top.sum() / bottom.sum() * bottom
    return float(residuals.std(ddof=1) / math.sqrt(len(top)) / bottom.mean())


def seed_spread(values: Sequence[float]) -> float | None:
    """Distance of the best from the worst training of one arm; None for a single one."""
    return max(values) - min(values) if len(values) > 1 else None


def _arrays(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired values must be two lists of one length: {a.shape}, {b.shape}")
    return a, b

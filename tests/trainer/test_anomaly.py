"""Which steps are left out."""

from __future__ import annotations

import math
import random

import pytest

from shoal.trainer.anomaly import LEAST, WINDOW, AnomalyDetector


def trained(limit: float, steps: int = WINDOW) -> AnomalyDetector:
    """A detector that has seen a calm run."""
    noise = random.Random(0)
    detector = AnomalyDetector(limit)
    for _ in range(steps):
        assert detector.accepts(3.0 + noise.gauss(0, 0.1), 1.0 + noise.gauss(0, 0.05))
    return detector


@pytest.mark.parametrize(
    ("loss", "norm", "taken"),
    [
        (3.0, 1.0, True),
        (3.4, 1.2, True),
        (4.0, 1.0, False),
        (3.0, 1.6, False),
        (1.0, 0.1, True),
        (math.nan, 1.0, False),
        (3.0, math.inf, False),
    ],
)
def test_what_is_no_number_or_far_off_is_left_out(loss: float, norm: float, taken: bool) -> None:
    detector = trained(limit=6)
    before = detector.history
    assert detector.accepts(loss, norm) is taken
    assert (detector.history == before) is not taken, "what is left out is no measure"


def test_without_a_limit_only_numbers_count() -> None:
    assert trained(limit=0).accepts(1e9, 1e9)
    assert not trained(limit=0).accepts(math.inf, 1.0)


def test_nothing_is_far_off_before_enough_is_known() -> None:
    assert trained(limit=6, steps=LEAST - 1).accepts(100.0, 1.0)
    assert not trained(limit=6, steps=LEAST).accepts(100.0, 1.0)


def test_a_saved_history_judges_alike() -> None:
    first = trained(limit=6)
    again = AnomalyDetector(6, first.history)
    assert again.history == first.history
    assert not again.accepts(4.0, 1.0)


def test_equal_losses_leave_no_room() -> None:
    detector = AnomalyDetector(6, [[2.0, 1.0]] * LEAST)
    assert detector.accepts(2.0, 1.0)
    assert not detector.accepts(2.1, 1.0)

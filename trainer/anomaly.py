"""Steps that must not be taken: a loss or gradient norm that is no number, or far off its past."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

WINDOW = 128
LEAST = 32
"""Steps that must be known before any is called far off."""


class AnomalyDetector:
    """Judges every step by the ones taken before it; all ranks see the same, and judge alike.

    The robust score of Iglewicz and Hoaglin (1993): distance from the median in units of the median
    absolute deviation, scaled to a standard deviation. Only upward: a loss that falls is no fault.
    """

    def __init__(self, limit: float, history: Iterable[Sequence[float]] = ()) -> None:
        """Start from a `history` that was saved; a `limit` of 0 refuses only what is no number."""
        self.limit = limit
        self._taken: deque[tuple[float, ...]] = deque(map(tuple, history), maxlen=WINDOW)

    @property
    def history(self) -> list[list[float]]:
        """Loss and gradient norm of the last steps taken, for a checkpoint."""
        return [list(values) for values in self._taken]

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether a step is to be taken; if so it is remembered."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        if self.limit and len(self._taken) >= LEAST:
            pasts = zip(*self._taken, strict=True)
            for value, past in zip((loss, norm), pasts, strict=True):
                if _robust_score(value, past) > self.limit:
                    return False
        self._taken.append((loss, norm))
        return True


def _robust_score(value: float, past: Sequence[float]) -> float:
    from statistics import median

    from scipy.stats import median_abs_deviation

    spread = float(median_abs_deviation(past, scale="normal"))
    distance = value - median(past)
    return distance / spread if spread else math.copysign(math.inf, distance) * (distance != 0)

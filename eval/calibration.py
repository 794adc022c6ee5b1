"""Calibration: is a model right more often where it is more confident?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 10
SMALLEST_BIN = 5


def calibrate(correct: Sequence[float], confidence: Sequence[float]) -> dict[str, Any]:
    """Accuracy by rank of confidence, in bins of equal size (Luo et al. 2024).

    Args:
        correct: 1 or 0 for every item.
        confidence: Distance of the two perplexities for every item.

    Returns:
        `bins` [{confidence, accuracy, n}], lowest confidence first, and the `slope` of a
        least-squares line through them: accuracy gained from the first bin to the last.
    """
    right, sure = np.asarray(correct, float), np.asarray(confidence, float)
    count = max(1, min(BINS, len(right) // SMALLEST_BIN))
    order = np.argsort(sure, kind="stable")
    parts = np.array_split(order, count)
    bins = [
        {
            "confidence": float(sure[part].mean()),
            "accuracy": float(right[part].mean()),
            "n": len(part),
        }
        for part in parts
    ]
    slope = None
    if count > 2:
        line = np.polyfit(np.linspace(0, 1, count), [b["accuracy"] for b in bins], 1)
        slope = float(line[0])
    return {"bins": bins, "slope": slope}

"""Intervals over seeds: few values, so Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def t_quantile(degrees: int) -> float:
    """t with P(|T| <= t) = 95 %, for a whole number of degrees of freedom from 1 on.

    By bisection on the closed form of that probability (Abramowitz and Stegun, Handbook of Mathematical Functions,
    26.7.3 and 26.7.4).
    """
    low, high = 0.0, 16.0  # 12.7 for one degree of freedom, less for more
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    if degrees % 2:
        term = cosine
        for k in range(3, degrees + 1, 2):
            total += term
            term *= cosine * cosine * (k - 1) / k
        return 2 / math.pi * (angle + math.sin(angle) * total)
    for k in range(2, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return math.sin(angle) * total


def over_seeds(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and 95 % interval of one number per seed: mean +- t(n - 1) s / sqrt(n). One seed has no interval.

    It tells how the mean would move with other seeds, on the same prompts. Equal values give an interval of no width.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}

"""Intervals over seeds: few values, so Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

FEW = (12.7062047362, 4.3026527297, 3.1824463053, 2.7764451052, 2.5705818356, 2.4469118511)  # t of 1, 2 ... degrees


def t_quantile(degrees: int) -> float:
    """t with P(|T| <= t) = 95 %, for a whole number of degrees of freedom from 1 on, right to 1e-4.

    The expansion for many degrees: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    if degrees <= len(FEW):
        return FEW[degrees - 1]
    z = 1.9599639845
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def over_seeds(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and 95 % interval of one number per seed: mean +- t(n - 1) s / sqrt(n). One seed has no interval.

    It tells how the mean would move with other seeds, on the same prompts. Equal values give an interval of no width.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}

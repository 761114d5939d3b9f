"""Confidence intervals for rates, means and their differences. Needs nothing but Python."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a binomial rate (E. B. Wilson, 1927); z = 1.96 covers 95 %.

    Raises ValueError when `trials` is not positive or `successes` is outside 0 .. trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes={successes}, trials={trials}: need 0 <= successes <= trials and trials >= 1")
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    units: Sequence[T], statistic: Callable[[Sequence[T]], float], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `statistic` over units drawn again with replacement (B. Efron, 1979).

    A unit is what was drawn independently: a prompt with all its answers, not an answer or a token. The same seed gives
    the same interval. Raises ValueError for fewer than two units.
    """
    if len(units) < 2:
        raise ValueError(f"{len(units)} units; an interval needs at least 2")
    random_ = random.Random(seed)
    values = sorted(statistic(random_.choices(units, k=len(units))) for _ in range(draws))
    return values[int(0.025 * draws)], values[math.ceil(0.975 * draws) - 1]


def difference(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float, float]:
    """b - a of two independent estimates {"value", "low", "high"}, with its 95 % interval.

    The method of variance estimates recovery (G. Y. Zou and A. Donner, 2008); for Wilson intervals it is R. G.
    Newcombe's hybrid score interval (1998).
    """
    value = b["value"] - a["value"]
    low = value - math.hypot(b["value"] - b["low"], a["high"] - a["value"])
    high = value + math.hypot(b["high"] - b["value"], a["value"] - a["low"])
    return value, low, high


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is 0."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation / math.sqrt(len(values))

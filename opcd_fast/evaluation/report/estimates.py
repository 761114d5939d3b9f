"""What a report counts over held-out prompts, as {"value", "low", "high", "n", "interval"}: a 95 % interval each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import torch

from opcd_fast.evaluation import Distance
from opcd_fast.runtime import bootstrap, wilson

PERCENTILES = (50, 90, 99)
Unit = TypeVar("Unit")


def estimate(units: Sequence[Unit], statistic: Callable[[Sequence[Unit]], float]) -> dict[str, Any]:
    """units: one for each prompt, which are drawn again as wholes."""
    low, high = bootstrap(units, statistic)
    return {"value": statistic(units), "low": low, "high": high, "n": len(units), "interval": "bootstrap"}


def mean(units: Sequence[float]) -> dict[str, Any]:
    return estimate(units, statistics.fmean)


def share(units: Sequence[float], per_prompt: int = 1) -> dict[str, Any]:
    """A rate. units: each prompt's share of its `per_prompt` answers.

    Wilson's interval for one answer a prompt; several answers to one prompt are not independent, so that prompts are
    drawn again as wholes. Where all are alike that would give an interval of no width: Wilson's then, with as many
    trials as prompts.
    """
    if (per_prompt > 1 and len(set(units)) > 1) or not set(units) <= {0.0, 1.0}:
        return mean(units)
    value = statistics.fmean(units)
    low, high = wilson(round(value * len(units)), len(units))
    return {"value": value, "low": low, "high": high, "n": len(units), "interval": "wilson"}


def kl_summary(found: Sequence[Distance]) -> dict[str, Any]:
    """Mean over prompts of the mean over tokens, and percentiles over all tokens."""
    tokens = torch.tensor([kl for one in found for kl in one.token_kl], dtype=torch.float64)
    marks = tokens.quantile(torch.tensor([p / 100 for p in PERCENTILES], dtype=torch.float64)).tolist()
    percentiles = {f"p{p}": mark for p, mark in zip(PERCENTILES, marks)}
    return {**mean([one.kl for one in found]), **percentiles, "tokens": tokens.numel()}


def gap(before: Sequence[Distance], after: Sequence[Distance]) -> dict[str, Any]:
    """Both summaries, and the share of the gap closed: 1 - KL after / KL before, both of the same prompts."""

    def closed(pairs: Sequence[tuple[float, float]]) -> float:
        first = sum(pair[0] for pair in pairs)
        return 1 - sum(pair[1] for pair in pairs) / first if first > 0 else 0.0

    pairs = [(a.kl, b.kl) for a, b in zip(before, after, strict=True)]
    return {"before": kl_summary(before), "after": kl_summary(after), "gap_closed": estimate(pairs, closed)}


def agreement(found: Sequence[Distance]) -> dict[str, Any]:
    """Share of tokens at which both models hold the same token most probable."""

    def pooled(drawn: Sequence[tuple[int, int]]) -> float:
        return sum(same for same, _ in drawn) / sum(count for _, count in drawn)

    return estimate([(sum(one.same_first), len(one.same_first)) for one in found], pooled)


def identical_greedy(most_probable: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Whether a model would write the greedy answers `wanted` itself, and where it would leave them first.

    most_probable: the model's most probable token at every place of them. Along equal tokens greedy decoding sees the
    same prefixes, so that nothing has to be generated to know where it differs first.
    """
    places = [first_difference(a, b) for a, b in zip(most_probable, wanted, strict=True)]
    found = sorted(place for place in places if place is not None)
    same = share([float(place is None) for place in places])
    return {"identical": same, "first_difference": {"median": statistics.median(found) if found else None, "of": found}}


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Number of equal tokens at the beginning; None when the two are the same."""
    return next((place for place, (left, right) in enumerate(zip_longest(a, b)) if left != right), None)

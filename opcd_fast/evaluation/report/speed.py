"""What a call costs less without the context: tokens, and the time until the first token of the answer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from opcd_fast.data import default_system_tokens
from opcd_fast.evaluation.report.arms import HeldOut
from opcd_fast.evaluation.report.models import RunModels
from opcd_fast.models import seam, virtual_tokens
from opcd_fast.runtime import Stopwatch

REPEATS = 5


def saved(models: RunModels, held_out: HeldOut) -> dict[str, Any]:
    """Mean tokens of the prompts with and without the context, and seconds to read the first one on this device.

    Timed on the base, one prompt at a time, medians of turns that alternate: a student whose adapter is merged costs
    the same. No cache of the context is counted for either; a server that keeps one saves less. A trained prefix is a
    cache: its `virtual_tokens` are no prompt tokens, and attention to them is not in the time.
    """
    tokens_with, tokens_without = (statistics.fmean(map(len, ids)) for ids in (held_out.within, held_out.without))
    prompts = {"with": held_out.within[0], "without": held_out.without[0]}
    took: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(REPEATS + 1):
        for name, ids in prompts.items():
            took[name].append(_prefill(models, ids))
    seconds = {name: statistics.median(values[1:]) for name, values in took.items()}  # the first one warms up
    return {
        "tokens_with_context": tokens_with,
        "tokens_without": tokens_without,
        "tokens": tokens_with - tokens_without,
        "prefill_seconds_with_context": seconds["with"],
        "prefill_seconds_without": seconds["without"],
        "prefill_seconds": seconds["with"] - seconds["without"],
        "timed_tokens": {name: len(ids) for name, ids in prompts.items()},
        "default_system_tokens": default_system_tokens(models.tokenizer),
        "virtual_tokens": virtual_tokens(models.student.model),
        "repeats": REPEATS,
    }


@torch.no_grad()
def _prefill(models: RunModels, ids: Sequence[int]) -> float:
    model = models.base.model
    body, row = seam.body_of(model), torch.tensor([list(ids)], device=model.device)
    watch = Stopwatch(model.device)
    with models.base.acting(), watch("prefill"):
        seam.run_body(body, row)
    return watch.seconds["prefill"]

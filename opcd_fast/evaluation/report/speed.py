"""What a call costs less without the context: tokens, and the time until the first token of the answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from opcd_fast.data import RenderedPrompt, whole_prompt
from opcd_fast.evaluation.report.arms import Prefixes
from opcd_fast.evaluation.report.models import RunModels
from opcd_fast.models import seam, virtual_tokens

REPEATS = 5


def saved(
    models: RunModels, rows: Sequence[RenderedPrompt], prefixes: Prefixes, timed: RenderedPrompt
) -> dict[str, Any]:
    """Mean tokens of the prompts with and without the context, and seconds to read the prompt `timed` on this device.

    Timed on the base, one prompt at a time, medians of turns that alternate: a student whose adapter is merged costs
    the same. No cache of the context is counted for either; a server that keeps one saves less. A trained prefix is a
    cache: its `virtual_tokens` are no prompt tokens, and attention to them is not in the time.
    """
    tokens_with = statistics.fmean(len(whole_prompt(row, prefixes)) for row in rows)
    tokens_without = statistics.fmean(len(row.student_ids) for row in rows)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    prompts = {"with": whole_prompt(timed, prefixes), "without": timed.student_ids}
    for turn in range(REPEATS + 1):
        for name, ids in prompts.items():
            took = _prefill(models, ids)
            if turn:  # the first one warms up
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens_with_context": tokens_with,
        "tokens_without": tokens_without,
        "tokens": tokens_with - tokens_without,
        "prefill_seconds_with_context": medians["with"],
        "prefill_seconds_without": medians["without"],
        "prefill_seconds": medians["with"] - medians["without"],
        "timed_tokens": {name: len(ids) for name, ids in prompts.items()},
        "virtual_tokens": virtual_tokens(models.student.model),
        "repeats": REPEATS,
    }


@torch.no_grad()
def _prefill(models: RunModels, ids: Sequence[int]) -> float:
    side = models.base
    body = seam.body_of(side.model)
    row = torch.tensor([list(ids)], device=models.device)
    with side.acting():
        start = _now(models.device)
        seam.run_body(body, row)
        return _now(models.device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

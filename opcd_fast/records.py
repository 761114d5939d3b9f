"""One step in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opcd_fast.batch import Sample
from opcd_fast.importance import Drift


def total_weight(samples: Sequence[Sample], normalize: str) -> float:
    return float(len(samples) if normalize == "sequence" else sum(len(sample.response) for sample in samples))


def step_record(
    step: int,
    loss: float,
    norm: float,
    samples: Sequence[Sample],
    answers: Sequence[Any],
    statistics: Sequence[Any],
    seconds: dict[str, float],
    drift: Drift,
) -> dict[str, Any]:
    tokens = sum(len(sample.response) for sample in samples)
    agreement = sum(float(stats.top1_agreement.float().sum()) for stats in statistics)
    entropy = sum(float(stats.student_entropy.sum()) for stats in statistics)
    kl = sum(float(stats.token_kl.sum()) for stats in statistics)
    return {
        "step": step,
        "kind": "step",
        "loss": loss,
        "kl_per_token": kl / tokens,
        "top1_agreement": agreement / tokens,
        "student_entropy": entropy / tokens,
        "grad_norm": norm,
        "response_tokens": tokens,
        "response_length": tokens / len(samples),
        "finished": sum(answer.finished for answer in answers) / len(answers),
        **drift.record(),
        "tokens_per_second": tokens / sum(seconds.values()),
        "seconds": {part: round(value, 4) for part, value in seconds.items()},
    }

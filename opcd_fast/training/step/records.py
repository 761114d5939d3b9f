"""One step in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opcd_fast.data import Sample
from opcd_fast.loss import Drift
from opcd_fast.training.settings import OPCDConfig


def step_record(
    step: int, config: OPCDConfig, loss: float, norm: float, rate: float, samples: Sequence[Sample],
    answers: Sequence[Any], statistics: Sequence[Any], seconds: dict[str, float], drift: Drift,
) -> dict[str, Any]:  # fmt: skip
    tokens = sum(len(sample.response) for sample in samples)
    return {
        "step": step,
        "kind": "step",
        "loss": loss,
        **_per_token(statistics, tokens),
        "grad_norm": norm,
        "learning_rate": rate,
        "answers": len(samples),
        "response_tokens": tokens,
        "response_length": tokens / len(samples),
        "finished": sum(answer.finished for answer in answers) / len(answers),
        **drift.record(),
        "tokens_per_second": tokens / sum(seconds.values()),
        "seconds": {part: round(value, 4) for part, value in seconds.items()},
        "objective": config.divergence if config.objective == "divergence" else config.objective,
        "answers_of": "file" if config.rollout == "replay" else config.answers,
    }


def _per_token(statistics: Sequence[Any], tokens: int) -> dict[str, float]:
    """Means over the step's tokens of what its objective knows of each."""
    names = {"token_kl": "kl_per_token", "top1_agreement": "top1_agreement", "student_entropy": "student_entropy"}
    if hasattr(statistics[0], "token_nll"):
        names = {"token_nll": "nll_per_token"}
    elif statistics[0].gate is not None:
        names |= {"gate": "gate"}
    return {
        name: sum(float(getattr(stats, field).float().sum()) for stats in statistics) / tokens
        for field, name in names.items()
    }

"""Negative log-likelihood of given answers: supervised fine-tuning, and distillation on whole sequences.

Where the answers were drawn from the teacher at the same temperature, this is a sample of the forward KL to it, up to
the teacher's entropy, and has the same gradient on average (Kim and Rush, arXiv 1606.07947, call it sequence-level
knowledge distillation).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd_fast.data import Batch
from opcd_fast.loss import Drift, LMHead, fused_linear_logprobs
from opcd_fast.runtime import Stopwatch
from opcd_fast.training.step.objective import present_head, student_hidden_states


@dataclass
class AnswerStats:
    """token_nll: -log p(token) of the student at every response token, (N,) fp32, detached."""

    token_nll: Tensor


def answer_nll(
    batch: Batch,
    student: Any,
    teacher: Any = None,
    *,
    temperature: float,
    denominator: float,
    compute_dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    student_head: LMHead | None = None,
    stopwatch: Stopwatch | None = None,
    drift: Drift | None = None,
) -> tuple[Tensor, AnswerStats]:
    """sum(w * -log p_student(token)) / denominator over the batch's response tokens.

    Called as `objective.context_kl`, which stands in its place otherwise; `teacher` is not looked at. temperature
    divides the student's logits, as it did when the answers were drawn. drift: as there.

    Returns:
        scalar loss, AnswerStats.
    """
    watch = stopwatch or Stopwatch()
    with watch("student"), autocast():
        h_s = student_hidden_states(student, batch)  # (N, D_s)
    with watch("loss"):
        logprobs = fused_linear_logprobs(
            h_s.to(compute_dtype),
            present_head(student_head, student).to(compute_dtype),
            batch.response_ids,
            temperature=temperature,
            workspace_bytes=workspace_bytes,
            backend=backend,
        )  # (N,)
        loss = -(logprobs * batch.token_weights).sum() / denominator
    if drift is not None and batch.behaviour_logprobs is not None:
        drift.add(logprobs.detach(), batch.behaviour_logprobs)
    return loss, AnswerStats(-logprobs.detach())

"""The quantity that is minimised, for one packed batch: student body, teacher body, fused loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from opcd_fast.data import Batch
from opcd_fast.errors import InputError
from opcd_fast.loss import (
    LMHead,
    LossStats,
    fused_linear_divergence,
    fused_linear_logprobs,
    importance_weights,
    same_vocabulary,
    trainer_logprobs,
)
from opcd_fast.models import packed_hidden_states, seam, shared_prompt_hidden_states
from opcd_fast.runtime import Stopwatch
from opcd_fast.training.settings import OPCDConfig, settings_with

REVERSE_KL: Mapping[str, Any] = {"divergence": "reverse_kl"}


class Teacher(Protocol):
    """What is asked of a teacher: a `ContextTeacher`, or one that stands in for it."""

    def hidden_states_packed(
        self, input_ids: Tensor, cu_seqlens: Tensor, *, context_index: Any = None, select: Tensor | None = None
    ) -> Tensor: ...

    @property
    def head(self) -> LMHead: ...


def context_kl(
    batch: Batch,
    student: Any,
    teacher: Teacher,
    *,
    temperature: float,
    denominator: float,
    compute_dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    divergence: Mapping[str, Any] = REVERSE_KL,
    student_head: LMHead | None = None,
    stopwatch: Stopwatch | None = None,
    drift: Callable[..., None] | None = None,
    correction: str = "none",
    clip: float = 1.0,
) -> tuple[Tensor, LossStats]:
    """sum(w * KL(student || teacher)) / denominator over the batch's response tokens, and its statistics.

    Args:
        batch: packed sequences on the models' device.
        student: transformers causal LM; gradients flow to it unless grad mode is off.
        teacher: reads the context in front of every sequence; never gets gradients.
        temperature: divides both models' logits.
        denominator: sum of the token weights over the whole step, micro-batches included.
        compute_dtype: type in which hidden states and heads are multiplied.
        autocast: makes the context of the student's forward when its weights are fp32 masters.
        student_head: where the caller has it already; None looks at the student.
        divergence: another one than the reverse KL, as keywords of `fused_linear_divergence`.
        drift: is told the student's and the sampler's log-probabilities, if the batch has them, as `Drift.add` is.
        correction: "token" or "sequence" multiplies the weights by `importance_weights` with bound `clip`; that takes
            one more product with the head, and log-probabilities in the batch (InputError without).
    Returns:
        scalar loss, LossStats with (N,) fields.
    """
    watch = stopwatch or Stopwatch()
    with watch("teacher"):
        h_t = teacher_hidden_states(teacher, batch)  # (N, D_t)
    with watch("student"), autocast():
        h_s = student_hidden_states(student, batch)  # (N, D_s)
    with watch("loss"):
        head_s, head_t = same_vocabulary(present_head(student_head, student), teacher.head)
        h_s, head_s = h_s.to(compute_dtype), head_s.to(compute_dtype)
        weights, logprobs, factors = batch.token_weights, None, None
        if correction != "none":
            if batch.behaviour_logprobs is None:
                raise InputError("importance_correction: the sampler gives no log-probabilities; set it to 'none'")
            options: dict[str, Any] = {"workspace_bytes": workspace_bytes, "backend": backend}
            with torch.no_grad():
                logprobs = fused_linear_logprobs(h_s, head_s, batch.response_ids, temperature=temperature, **options)
            behaviour = batch.behaviour_logprobs
            factors = importance_weights(logprobs, behaviour, batch.response_cu_seqlens, correction, clip)
            weights = weights * factors
        loss, stats = fused_linear_divergence(
            h_s,
            head_s,
            h_t.to(compute_dtype),
            head_t.to(compute_dtype),
            token_weights=weights,
            temperature=temperature,
            denominator=denominator,
            workspace_bytes=workspace_bytes,
            return_stats=True,
            backend=backend,
            token_ids=batch.response_ids,
            **divergence,
        )
        if drift is not None and batch.behaviour_logprobs is not None and head_s.group is None:
            if logprobs is None:
                logprobs = trainer_logprobs(h_s, head_s, batch.response_ids, stats.student_logsumexp, temperature)
            drift(logprobs, batch.behaviour_logprobs, factors)
        return loss, stats


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
    drift: Callable[..., None] | None = None,
) -> tuple[Tensor, SimpleNamespace]:
    """sum(w * -log p_student(token)) / denominator over the batch's response tokens: supervised fine-tuning, and
    distillation on whole sequences.

    Where the answers were drawn from the teacher at the same temperature, this is a sample of the forward KL to it, up
    to the teacher's entropy, and has the same gradient on average (Kim and Rush, arXiv 1606.07947, call it
    sequence-level knowledge distillation). Called as `context_kl`; `teacher` is not looked at.

    Returns:
        scalar loss; token_nll: -log p(token) of the student at every response token, (N,) fp32, detached.
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
        drift(logprobs.detach(), batch.behaviour_logprobs)
    return loss, SimpleNamespace(token_nll=-logprobs.detach())


def objective_of(config: OPCDConfig) -> Callable[..., tuple[Tensor, Any]]:
    """What a run minimises, called as `context_kl`."""
    if config.objective == "nll":
        return answer_nll
    return partial(
        context_kl,
        divergence={name: getattr(config, name) for name in settings_with(belongs="divergence")},
        correction=config.importance_correction,
        clip=config.importance_clip,
    )


def present_head(head: LMHead | None, student: Any) -> LMHead:
    """`head` with the weights that `student` has now: in a sharded forward they are other tensors than outside."""
    if head is None:
        return LMHead.from_model(student)
    weight, bias = seam.head_weights(student)
    return head if weight is head.weight else replace(head, weight=weight, bias=bias)


def teacher_hidden_states(teacher: Teacher, batch: Batch) -> Tensor:
    return teacher.hidden_states_packed(
        batch.teacher_ids, batch.teacher_cu_seqlens, context_index=batch.context_index,
        select=batch.response_index_teacher,
    )  # fmt: skip


def student_hidden_states(student: Any, batch: Batch) -> Tensor:
    row = (batch.student_ids, batch.student_cu_seqlens)
    if batch.student_parent is None:
        return packed_hidden_states(student, *row, select=batch.response_index_student)
    return shared_prompt_hidden_states(student, *row, batch.student_parent, select=batch.response_index_student)

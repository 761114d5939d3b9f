"""Held-out evaluation: how far the student still is from the teacher that sees the context."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opcd_fast.data import RenderedPrompt, Sample, pack
from opcd_fast.models import seam
from opcd_fast.rollout import Completion
from opcd_fast.runtime import mean_and_error
from opcd_fast.training.engines import Engine, TokenBudget
from opcd_fast.training.step.objective import Teacher, context_kl


@torch.no_grad()
def divergence(
    samples: Sequence[Sample], student: Any, teacher: Teacher, *, temperature: float, compute_dtype: torch.dtype,
    device: torch.device, micro_batch_tokens: int | None = None, budget: TokenBudget | None = None,
    engine: Engine | None = None, each: list[float] | None = None, **loss_options: Any,
) -> dict[str, float]:  # fmt: skip
    """Divergence of student and teacher on given sequences, without gradients.

    budget: in place of `micro_batch_tokens`, one that is shared with training, so that both keep what fits; its ranks
    share the sequences out, and all get the same numbers. engine: where the models' weights can be read. each: gets
    the mean token KL of every sequence, in order.

    Returns:
        kl: mean over sequences of the mean token KL(student || teacher), nats;
        kl_error: standard error of that mean;
        kl_per_token: mean over all tokens, nats;
        top1_agreement: share of tokens where both models' most probable token is the same;
        first_token: median over sequences of the student's probability of the first token, where the samples have their
        sampler's log-probabilities.
    """
    if budget is None:
        budget = TokenBudget(micro_batch_tokens)
    ranks = budget.ranks
    score = context_kl if engine is None else engine.inside(context_kl)

    def measured() -> tuple[list[float], list[float], float, float, int]:
        by_token = agreement = 0.0
        by_sequence: list[float] = []
        first_tokens: list[float] = []
        tokens = 0
        for turn in budget.rounds(samples):
            batch = pack(turn.samples).to(device)
            seen: list[Tensor] = []
            _, stats = score(
                batch,
                student,
                teacher,
                temperature=temperature,
                denominator=1.0,
                compute_dtype=compute_dtype,
                drift=lambda logprobs, *_, seen=seen: seen.append(logprobs),
                **loss_options,
            )
            if turn.empty:
                continue
            lengths = batch.response_cu_seqlens.diff().tolist()
            by_sequence += [float(answer.sum()) for answer in (stats.token_kl * batch.token_weights).split(lengths)]
            first_tokens += [float(answer[0].exp()) for x in seen for answer in x.split(lengths)]
            by_token += float(stats.token_kl.sum())
            agreement += float(stats.top1_agreement.float().sum())
            tokens += batch.response_ids.numel()
        return by_sequence, first_tokens, by_token, agreement, tokens

    with seam.scoring_mode(student):
        if engine is not None:
            engine.read_contexts(teacher, samples)
        by_sequence, first_tokens, by_token, agreement, tokens = budget.retrying(measured, "evaluation")
    by_sequence = ranks.gather_lists(by_sequence)
    if each is not None:
        each += by_sequence
    kl, error = mean_and_error(by_sequence)
    by_token, agreement, tokens = map(sum, zip(*ranks.gather((by_token, agreement, tokens))))
    first_tokens = ranks.gather_lists(first_tokens)
    record = {
        "kl": kl,
        "kl_error": error,
        "kl_per_token": by_token / tokens,
        "top1_agreement": agreement / tokens,
    }
    return record | ({"first_token": statistics.median(first_tokens)} if first_tokens else {})


def samples_of(rows: Sequence[RenderedPrompt], completions: Sequence[Completion]) -> list[Sample]:
    """Prompts and answers, paired in order."""
    return [
        Sample(row.student_ids, row.teacher_ids, row.context_index, answer.token_ids, answer.logprobs)
        for row, answer in zip(rows, completions)
    ]

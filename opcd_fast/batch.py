"""One step's sequences, packed: a row per token, sequences back to back, no padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed student and teacher sequences of one step (B sequences, N response tokens in all).

    The last response token predicts nothing, so it is in neither model's input.
    """

    student_ids: Tensor  # (sum T_s,) int64: prompt and response
    student_cu_seqlens: Tensor  # (B + 1,) int32
    teacher_ids: Tensor  # (sum T_t,) int64: what follows the shared prefix, and the response
    teacher_cu_seqlens: Tensor  # (B + 1,) int32
    context_index: Tensor  # (B,) int64: which shared prefix each sequence continues
    response_index_student: Tensor  # (N,) int64: positions whose hidden state predicts a response token
    response_index_teacher: Tensor  # (N,) int64
    token_weights: Tensor  # (N,) float32
    response_ids: Tensor  # (N,) int64
    response_cu_seqlens: Tensor  # (B + 1,) int32
    behaviour_logprobs: Tensor | None  # (N,) float32: log-probability under the sampler, or None

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {n: v if v is None else v.to(device) for n, v in vars(self).items()}
        return Batch(**moved)


@dataclass(frozen=True)
class Sample:
    """One answer with the prompts it was drawn for. All ids are plain Python integers."""

    student_prompt: Sequence[int]
    teacher_prompt: Sequence[int]  # after the shared prefix; never empty
    context_index: int
    response: Sequence[int]  # up to and including the stop token
    logprobs: Sequence[float] | None = None  # of the response under the sampler


def pack(samples: Sequence[Sample], *, normalize: str = "sequence") -> Batch:
    """Pack samples into a Batch on the CPU.

    Args:
        normalize: "sequence" gives each response token weight 1/|y|, so that sum(w * kl) / B is the paper's Eq. 1
            (arXiv 2602.12275); "token" gives every response token weight 1.
    Raises:
        ValueError: no sample, an empty response or an empty prompt.
    """
    if not samples:
        raise ValueError("samples is empty; a batch needs at least one sequence")
    student_rows, teacher_rows, weights = [], [], []
    for index, sample in enumerate(samples):
        length = len(sample.response)
        if not length or not sample.student_prompt or not sample.teacher_prompt:
            raise ValueError(f"samples[{index}] has an empty prompt or response")
        student_rows.append([*sample.student_prompt, *sample.response[:-1]])
        teacher_rows.append([*sample.teacher_prompt, *sample.response[:-1]])
        weights.append(torch.full((length,), 1.0 / length if normalize == "sequence" else 1.0))
    lengths = [len(sample.response) for sample in samples]
    student_cu, teacher_cu = _offsets(map(len, student_rows)), _offsets(map(len, teacher_rows))
    has_logprobs = all(sample.logprobs is not None for sample in samples)
    return Batch(
        student_ids=_flat(student_rows),
        student_cu_seqlens=student_cu,
        teacher_ids=_flat(teacher_rows),
        teacher_cu_seqlens=teacher_cu,
        context_index=torch.tensor([sample.context_index for sample in samples]),
        response_index_student=_tails(student_cu, lengths),
        response_index_teacher=_tails(teacher_cu, lengths),
        token_weights=torch.cat(weights),
        response_ids=_flat([sample.response for sample in samples]),
        response_cu_seqlens=_offsets(lengths),
        behaviour_logprobs=torch.tensor([p for s in samples for p in s.logprobs or ()]) if has_logprobs else None,
    )


def micro_batches(samples: Sequence[Sample], max_tokens: int | None) -> Iterator[list[Sample]]:
    """Split samples, in order, into groups of at most `max_tokens` student plus teacher tokens each.

    A single sample above the bound makes a group of its own: sequences are never cut.
    """
    group: list[Sample] = []
    used = 0
    for sample in samples:
        size = len(sample.student_prompt) + len(sample.teacher_prompt) + 2 * (len(sample.response) - 1)
        if group and max_tokens is not None and used + size > max_tokens:
            yield group
            group, used = [], 0
        group.append(sample)
        used += size
    if group:
        yield group


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def _offsets(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _tails(cu_seqlens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Positions of the last `lengths[i]` tokens of each packed sequence."""
    ends = cu_seqlens[1:].tolist()
    return torch.cat([torch.arange(end - length, end) for end, length in zip(ends, lengths)])

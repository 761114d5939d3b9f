"""One step's sequences, packed: a row per token, sequences back to back, no padding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from opcd_fast.data.rendering import common_prefix_length
from opcd_fast.runtime import token_ids

# A beginning that all prompts have is read once from this many tokens on, and where it saves this share of the row:
# below, the second phase of attention costs more than it saves.
MIN_SHARED_PREFIX = 8
MIN_SAVING = 0.1


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed student and teacher sequences of one step (B sequences, N response tokens in all).

    The last response token predicts nothing, so it is in neither model's input. With `student_parent` the student's
    row has S segments instead of B sequences: what several sequences begin with is one, the rest of each another.
    """

    student_ids: Tensor  # (sum T_s,) int64: prompt and response
    student_cu_seqlens: Tensor  # (B + 1,) or (S + 1,) int32
    teacher_ids: Tensor  # (sum T_t,) int64: what follows the shared prefix, and the response
    teacher_cu_seqlens: Tensor  # (B + 1,) int32
    context_index: Tensor  # (B,) int64: which shared prefix each sequence continues
    response_index_student: Tensor  # (N,) int64: positions whose hidden state predicts a response token
    response_index_teacher: Tensor  # (N,) int64
    token_weights: Tensor  # (N,) float32
    response_ids: Tensor  # (N,) int64
    response_cu_seqlens: Tensor  # (B + 1,) int32
    behaviour_logprobs: Tensor | None  # (N,) float32: log-probability under the sampler, NaN of others' tokens; or None
    student_parent: Tensor | None = None  # (S,) int64: index of the segment before it, -1 for none; None: not shared

    def to(self, device: torch.device) -> Batch:
        """On `device`, but for what the host reads: fetching it back would wait for the device each time.

        On the CPU stay both `cu_seqlens` of whole sequences, `context_index`, `student_parent` and
        `response_index_teacher`; a kernel of your own wants them moved.
        """
        moved = {n: v if v is None or n in _READ_BY_THE_HOST else v.to(device) for n, v in vars(self).items()}
        return Batch(**moved)

    def without_weight(self) -> Batch:
        """The same sequences, none of which counts: loss and gradients are zeros."""
        return replace(self, token_weights=torch.zeros_like(self.token_weights))


_READ_BY_THE_HOST = frozenset(
    {"student_cu_seqlens", "teacher_cu_seqlens", "context_index", "student_parent", "response_index_teacher"}
)


@dataclass(frozen=True)
class Sample:
    """One answer with the prompts it was drawn for; tokens become tuples. Raises InputError for what is no token id."""

    student_prompt: Sequence[int]
    teacher_prompt: Sequence[int]  # after the shared prefix; never empty
    context_index: int
    response: Sequence[int]  # up to and including the stop token
    logprobs: Sequence[float] | None = None  # of the response under the sampler; NaN: another one wrote it

    def __post_init__(self) -> None:
        for name in ("student_prompt", "teacher_prompt", "response"):
            object.__setattr__(self, name, tuple(token_ids(name, getattr(self, name))))
        logprobs: Any = self.logprobs
        if hasattr(logprobs, "tolist"):
            object.__setattr__(self, "logprobs", logprobs.tolist())


def pack(samples: Sequence[Sample], *, normalize: str = "sequence", share_prompts: bool = False) -> Batch:
    """Pack samples into a Batch on the CPU. Where any of them has no logprobs, `behaviour_logprobs` is None for all.

    Args:
        normalize: "sequence" gives each response token weight 1/|y|, so that sum(w * kl) / B is the paper's Eq. 1
            (arXiv 2602.12275); "token" gives every response token weight 1.
        share_prompts: what student prompts have in common occurs once in the student's row, see
            `opcd_fast.models.shared_prompts`: equal prompts, or the beginning of all of them (a system prompt) where
            that saves more. Everything per response stays in the order of `samples`.
    Raises:
        ValueError: no sample, an empty response or an empty prompt, logprobs of another length than the response,
            another `normalize`.
    """
    if not samples:
        raise ValueError("samples is empty; a batch needs at least one sequence")
    for index, sample in enumerate(samples):
        if not sample.response or not sample.student_prompt or not sample.teacher_prompt:
            raise ValueError(f"samples[{index}] has an empty prompt or response")
        if sample.logprobs is not None and len(sample.logprobs) != len(sample.response):
            raise ValueError(f"samples[{index}].logprobs must be None or one for each of {len(sample.response)} tokens")
    lengths = [len(sample.response) for sample in samples]
    teacher_rows = [[*sample.teacher_prompt, *sample.response[:-1]] for sample in samples]
    teacher_cu = _offsets(map(len, teacher_rows))
    each = _counts_sequences(normalize)
    weights = [1.0 / length if each else 1.0 for length in lengths]
    has_logprobs = all(sample.logprobs is not None for sample in samples)
    return Batch(
        **(_shared_rows(samples) if share_prompts else _separate_rows(samples)),
        teacher_ids=_flat(teacher_rows),
        teacher_cu_seqlens=teacher_cu,
        context_index=torch.tensor([sample.context_index for sample in samples]),
        response_index_teacher=_tails(teacher_cu, lengths),
        token_weights=torch.tensor(weights).repeat_interleave(torch.tensor(lengths)),
        response_ids=_flat([sample.response for sample in samples]),
        response_cu_seqlens=_offsets(lengths),
        behaviour_logprobs=torch.tensor([p for s in samples for p in s.logprobs or ()]) if has_logprobs else None,
    )


def total_weight(samples: Sequence[Sample], normalize: str) -> float:
    """What the `token_weights` of all of a step's samples sum to, however they are packed: the loss's denominator."""
    return float(len(samples) if _counts_sequences(normalize) else sum(len(sample.response) for sample in samples))


def _counts_sequences(normalize: str) -> bool:
    if normalize not in ("sequence", "token"):
        raise ValueError(f"normalize is {normalize!r}; expected 'sequence' or 'token'")
    return normalize == "sequence"


def _separate_rows(samples: Sequence[Sample]) -> dict[str, Any]:
    """The student's fields of a Batch, one sequence for each sample."""
    rows = [[*sample.student_prompt, *sample.response[:-1]] for sample in samples]
    bounds = _offsets(map(len, rows))
    index = _tails(bounds, [len(sample.response) for sample in samples])
    return {"student_ids": _flat(rows), "student_cu_seqlens": bounds, "response_index_student": index}


def _shared_rows(samples: Sequence[Sample]) -> dict[str, Any]:
    """The student's fields of a Batch, one segment for each beginning that several samples have and each rest."""
    segments: list[Sequence[int]] = []
    parents: list[int] = []
    index_of: list[Tensor] = [torch.empty(0)] * len(samples)  # positions that predict each response
    end = 0
    groups = _groups(samples)
    if all(len(members) == 1 for _, members in groups):
        return _separate_rows(samples)
    for beginning, members in groups:
        parent = len(segments) if len(members) > 1 else -1
        if parent >= 0:
            segments.append(beginning)
            parents.append(-1)
            end += len(beginning)
        last = end - 1  # of a shared prompt; predicts the first token of every response
        for member in members:
            prompt, response = samples[member].student_prompt, samples[member].response
            rest = prompt if parent < 0 else prompt[len(beginning) :]
            segments.append([*rest, *response[:-1]])
            parents.append(parent)
            end += len(segments[-1])
            places = torch.arange(end - len(response), end)
            if not rest:
                places[0] = last
            index_of[member] = places
    return {
        "student_ids": _flat(segments),
        "student_cu_seqlens": _offsets(map(len, segments)),
        "student_parent": torch.tensor(parents),
        "response_index_student": torch.cat(index_of),
    }


def _groups(samples: Sequence[Sample]) -> list[tuple[tuple[int, ...], list[int]]]:
    """(tokens, indices of the samples that begin with them): equal prompts, or all samples where that saves more."""
    siblings: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        siblings.setdefault(tuple(sample.student_prompt), []).append(index)
    by_prompt = list(siblings.items())
    length = common_prefix_length(list(siblings)) if len(siblings) > 1 else 0
    saved = length * (len(samples) - 1)
    total = sum(len(sample.student_prompt) + len(sample.response) - 1 for sample in samples)
    enough = length >= MIN_SHARED_PREFIX and saved >= MIN_SAVING * total
    if enough and saved > sum(len(prompt) * (len(members) - 1) for prompt, members in by_prompt):
        return [(by_prompt[0][0][:length], list(range(len(samples))))]
    return by_prompt


def micro_batches(
    samples: Sequence[Sample], max_tokens: int | None, *, share_prompts: bool = False
) -> Iterator[list[Sample]]:
    """Split samples, in order, into groups of at most `max_tokens` student plus teacher tokens each.

    A single sample above the bound makes a group of its own: sequences are never cut. With share_prompts, neighbours
    of one student prompt count it once, and stay together where a group can hold them all; a beginning that different
    prompts have counts for each, although it is read once.
    """
    bound = math.inf if max_tokens is None else max_tokens
    runs = prompt_runs(samples) if share_prompts else [[sample] for sample in samples]
    group: list[Sample] = []
    used = 0
    for run in runs:
        shared = len(run[0].student_prompt)
        if group and used + sum(map(_tokens, run)) - shared * (len(run) - 1) > bound:
            yield group
            group, used = [], 0
        for place, sample in enumerate(run):
            size = _tokens(sample) - (shared if place else 0)
            if group and used + size > bound:  # only a run that no group can hold
                yield group
                group, used, size = [], 0, _tokens(sample)
            group.append(sample)
            used += size
    if group:
        yield group


def count_tokens(group: Sequence[Sample], *, share_prompts: bool = False) -> int:
    """Student and teacher tokens of a micro-batch, as `micro_batches` counts them."""
    total = sum(map(_tokens, group))
    if share_prompts:
        total -= sum(len(run[0].student_prompt) * (len(run) - 1) for run in prompt_runs(group))
    return total


def prompt_runs(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Neighbours with one student prompt together, in order."""
    return [list(run) for _, run in groupby(samples, key=lambda sample: tuple(sample.student_prompt))]


def _tokens(sample: Sample) -> int:
    """Student and teacher tokens of one sample."""
    return len(sample.student_prompt) + len(sample.teacher_prompt) + 2 * (len(sample.response) - 1)


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def _offsets(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _tails(cu_seqlens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Positions of the last `lengths[i]` tokens of each packed sequence."""
    ends = cu_seqlens[1:].tolist()
    return torch.cat([torch.arange(end - length, end) for end, length in zip(ends, lengths)])

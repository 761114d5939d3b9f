"""KL between the models of a run, token by token, and where their most probable tokens agree."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd_fast.data import Prompt, Sample, adapt_to_tokenizer, common_prefix_length, micro_batches, pack, student_ids
from opcd_fast.errors import InputError
from opcd_fast.evaluation.report.arms import mean
from opcd_fast.evaluation.report.models import RunModels, Side
from opcd_fast.loss import LMHead, fused_linear_divergence, same_vocabulary
from opcd_fast.models import packed_hidden_states, virtual_tokens
from opcd_fast.runtime import bootstrap, stream_seed
from opcd_fast.teacher import ContextTeacher

PERCENTILES = (50, 90, 99)
MICRO_BATCH_TOKENS = 8192
ROWS_AT_ONCE = 256  # of logits, when the most probable tokens are looked for

Responses = Sequence[Sequence[int]]


@dataclass(frozen=True)
class AnswerDistance:
    """One answer: KL of each token in nats, and where the most probable tokens agree."""

    token_kl: list[float]
    same_first: list[bool]

    @property
    def kl(self) -> float:
        return statistics.fmean(self.token_kl)


class Reader:
    """One model on one list of prompts. What these have in common, a context or a template's own words, is read once;
    behind a trained prefix every prompt is read whole.

    prompts: token ids, one row per answer. groups: (B,) prompts of one group share a beginning (one context each);
    None: all of them.
    """

    def __init__(
        self,
        side: Side,
        prompts: Sequence[Sequence[int]],
        settings: Mapping[str, Any],
        groups: Sequence[int] | None = None,
    ) -> None:
        self._prompts, self._groups = prompts, list(groups or [0] * len(prompts))
        self._model, self._device = side.model, next(side.model.parameters()).device
        self._tokens = settings.get("micro_batch_tokens") or MICRO_BATCH_TOKENS
        self._teacher: ContextTeacher | None = None
        if not side.off and virtual_tokens(side.model):
            self._shared, self.head = [0] * (max(self._groups) + 1), LMHead.from_model(side.model)
            return
        members = [[p for p, g in zip(prompts, self._groups) if g == group] for group in range(max(self._groups) + 1)]
        # One token at least stays with each prompt: its hidden state predicts the answer's first token.
        shared = [min(common_prefix_length(rows), *(len(row) - 1 for row in rows)) if rows else 0 for rows in members]
        self._shared = shared
        contexts = [
            torch.tensor(list(rows[0][:n]) if rows else [], dtype=torch.int64) for rows, n in zip(members, shared)
        ]
        try:
            self._teacher = ContextTeacher(
                side.model, contexts, path=settings.get("teacher_path", "auto"), adapter=side.adapter
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        self.head = self._teacher.head

    @torch.no_grad()
    def hidden(self, responses: Responses) -> Tensor:
        """(N, D): for every token of the responses the hidden state that predicts it."""
        samples = []
        for prompt, group, response in zip(self._prompts, self._groups, responses, strict=True):
            own = prompt[self._shared[group] :]
            samples.append(Sample(own, own, group, response))
        pieces = []
        for group_of_samples in micro_batches(samples, self._tokens):
            batch = pack(group_of_samples).to(self._device)
            row, places = (batch.teacher_ids, batch.teacher_cu_seqlens), batch.response_index_teacher
            if self._teacher is None:
                pieces.append(packed_hidden_states(self._model, *row, select=places))
            else:
                options = {"context_index": batch.context_index, "select": places}
                pieces.append(self._teacher.hidden_states_packed(*row, **options))
        return torch.cat(pieces)

    @torch.no_grad()
    def most_probable(self, responses: Responses) -> list[list[int]]:
        """For every token of the responses the one that the model holds most probable in its place."""
        hidden, head, found = self.hidden(responses), self.head, []
        for rows in hidden.split(ROWS_AT_ONCE):
            logits = rows @ head.weight[: head.valid_size].T  # a softcap and a positive scale keep the order
            if head.bias is not None:
                logits = logits + head.bias[: head.valid_size]
            found.append((logits if head.scale > 0 else -logits).argmax(-1))
        tokens = torch.cat(found).tolist()
        rows_of, start = [], 0
        for response in responses:
            rows_of.append(tokens[start : start + len(response)])
            start += len(response)
        return rows_of


@torch.no_grad()
def distances(
    student: Reader, teacher: Reader, responses: Responses, temperature: float, per_prompt: int = 1
) -> list[AnswerDistance]:
    """KL(student || teacher) of the responses' tokens, logits divided by `temperature`; one entry per prompt."""
    return compared(
        student.hidden(responses), student, teacher.hidden(responses), teacher, responses, temperature, per_prompt
    )


@torch.no_grad()
def compared(
    h_s: Tensor,
    student: Reader,
    h_t: Tensor,
    teacher: Reader,
    responses: Responses,
    temperature: float,
    per_prompt: int,
) -> list[AnswerDistance]:
    """The same from hidden states (N, D) that are there already."""
    head_s, head_t = same_vocabulary(student.head, teacher.head)
    _, stats = fused_linear_divergence(
        h_s, head_s, h_t, head_t, divergence="reverse_kl", temperature=temperature, reduction="sum", return_stats=True
    )
    sizes = [len(response) for response in responses]
    kl, same = stats.token_kl.cpu().split(sizes), stats.top1_agreement.cpu().split(sizes)
    found = []
    for start in range(0, len(sizes), per_prompt):
        part = slice(start, start + per_prompt)
        found.append(AnswerDistance(torch.cat(kl[part]).tolist(), [bool(x) for x in torch.cat(same[part])]))
    return found


def summary(found: Sequence[AnswerDistance]) -> dict[str, Any]:
    """Mean over prompts of the mean over tokens with its interval, and percentiles over all tokens."""
    tokens = torch.tensor([kl for one in found for kl in one.token_kl], dtype=torch.float64)
    marks = tokens.quantile(torch.tensor([p / 100 for p in PERCENTILES], dtype=torch.float64)).tolist()
    percentiles = {f"p{p}": mark for p, mark in zip(PERCENTILES, marks)}
    return {**mean([one.kl for one in found]), **percentiles, "tokens": tokens.numel()}


def gap(before: Sequence[AnswerDistance], after: Sequence[AnswerDistance]) -> dict[str, Any]:
    """Both summaries, and the share of the gap closed: 1 - KL after / KL before, both of the same prompts."""

    def closed(pairs: Sequence[tuple[float, float]]) -> float:
        first = sum(pair[0] for pair in pairs)
        return 1 - sum(pair[1] for pair in pairs) / first if first > 0 else 0.0

    pairs = [(a.kl, b.kl) for a, b in zip(before, after, strict=True)]
    low, high = bootstrap(pairs, closed)
    share = {"value": closed(pairs), "low": low, "high": high, "n": len(pairs), "interval": "bootstrap"}
    return {"before": summary(before), "after": summary(after), "gap_closed": share}


def agreement(found: Sequence[AnswerDistance]) -> dict[str, Any]:
    """Share of tokens at which the most probable token is the teacher's."""
    units = [(sum(one.same_first), len(one.same_first)) for one in found]

    def pooled(drawn: Sequence[tuple[int, int]]) -> float:
        return sum(same for same, _ in drawn) / sum(count for _, count in drawn)

    low, high = bootstrap(units, pooled)
    return {"value": pooled(units), "low": low, "high": high, "n": len(found), "interval": "bootstrap"}


def forgetting(
    models: RunModels,
    general: Sequence[Prompt],
    variables: Mapping[str, Any],
    sampling: Mapping[str, Any],
    seed: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """KL(student || base) without any context, on the student's answers to unrelated prompts."""
    prompts = adapt_to_tokenizer(models.tokenizer, general)
    ids = [student_ids(models.tokenizer, prompt, variables) for prompt in prompts]
    answers = models.student.answers(ids, seed=stream_seed(seed, "report general", 0), **sampling)
    student, base = Reader(models.student, ids, settings), Reader(models.base, ids, settings)
    found = distances(student, base, [answer.token_ids for answer in answers], sampling["temperature"])
    return {"kl": summary(found), "top1_agreement": agreement(found), "prompts": len(found)}

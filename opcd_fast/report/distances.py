"""KL between the models of a run, token by token."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opcd_fast.batch import Sample, micro_batches, pack
from opcd_fast.errors import InputError
from opcd_fast.evaluate import samples_of
from opcd_fast.intervals import bootstrap
from opcd_fast.messages import Prompt
from opcd_fast.objective import context_kl
from opcd_fast.rendering import RenderedPrompt, adapt_to_tokenizer, student_ids
from opcd_fast.report.arms import Answers, mean
from opcd_fast.report.models import RunModels, Side
from opcd_fast.seeds import stream_seed
from opcd_fast.teacher import ContextTeacher

PERCENTILES = (50, 90, 99)
MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class AnswerDistance:
    """One answer: KL of each token in nats, and where the most probable tokens agree."""

    token_kl: list[float]
    same_first: list[bool]

    @property
    def kl(self) -> float:
        return statistics.fmean(self.token_kl)


class Distances:
    """KL(side || teacher with the context); the contexts are read at the first use."""

    def __init__(
        self,
        models: RunModels,
        prefixes: Sequence[Sequence[int]],
        temperature: float,
        settings: Mapping[str, Any],
        reader: Side | None = None,
    ) -> None:
        """reader: who reads the contexts; None: the teacher."""
        side = reader or models.teacher
        try:
            self._teacher = ContextTeacher(
                side.model,
                [torch.tensor(prefix, dtype=torch.int64) for prefix in prefixes],
                path=settings.get("teacher_path", "auto"),
                adapter=side.adapter,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        self._models, self._temperature = models, temperature
        self._tokens = settings.get("micro_batch_tokens") or MICRO_BATCH_TOKENS

    @torch.no_grad()
    def __call__(self, side: Side, samples: Sequence[Sample]) -> list[AnswerDistance]:
        found: list[AnswerDistance] = []
        for group in micro_batches(samples, self._tokens):
            with side.acting():
                _, stats = context_kl(
                    pack(group).to(self._models.device),
                    side.model,
                    self._teacher,
                    temperature=self._temperature,
                    denominator=1.0,
                    compute_dtype=self._models.dtype,
                )
            sizes = [len(sample.response) for sample in group]
            for kl, same in zip(stats.token_kl.cpu().split(sizes), stats.top1_agreement.cpu().split(sizes)):
                found.append(AnswerDistance(kl.tolist(), [bool(x) for x in same.tolist()]))
        return found


def distances(distance: Distances, side: Side, answers: Answers) -> list[AnswerDistance]:
    """One per prompt: the tokens of its answers together."""
    found, n = distance(side, answers.samples), answers.per_prompt
    return [
        AnswerDistance(
            [kl for one in found[start : start + n] for kl in one.token_kl],
            [same for one in found[start : start + n] for same in one.same_first],
        )
        for start in range(0, len(found), n)
    ]


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

    def pooled(units: Sequence[AnswerDistance]) -> float:
        flags = [flag for one in units for flag in one.same_first]
        return sum(flags) / len(flags)

    low, high = bootstrap(found, pooled)
    return {"value": pooled(found), "low": low, "high": high, "n": len(found), "interval": "bootstrap"}


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
    ids = [tuple(student_ids(models.tokenizer, prompt, variables)) for prompt in prompts]
    rows = [RenderedPrompt(row, row, 0, has_context=False) for row in ids]
    answers = models.student.answers(ids, seed=stream_seed(seed, "report general", 0), **sampling)
    distance = Distances(models, [()], sampling["temperature"], settings, reader=models.base)
    found = distance(models.student, samples_of(rows, answers))
    return {"kl": summary(found), "top1_agreement": agreement(found), "prompts": len(found)}

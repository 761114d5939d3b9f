"""KL between two models on given answers, token by token, and where their most probable tokens agree."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd_fast.data import Sample, common_prefix_length, micro_batches, pack
from opcd_fast.errors import InputError
from opcd_fast.loss import LMHead, fused_linear_divergence, same_vocabulary
from opcd_fast.models import packed_hidden_states, virtual_tokens
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training.step import teacher_hidden_states

MICRO_BATCH_TOKENS = 8192
ROWS_AT_ONCE = 256  # of logits, when the most probable tokens are looked for


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model makes of B answers with N tokens in all."""

    hidden: Tensor  # (N, D): the hidden states that predict the tokens
    head: LMHead
    lengths: list[int]  # (B,)

    @torch.no_grad()
    def most_probable(self) -> list[list[int]]:
        """For every token the one that the model holds most probable in its place."""
        head, found = self.head, []
        for rows in self.hidden.split(ROWS_AT_ONCE):
            logits = rows @ head.weight[: head.valid_size].T  # a softcap and a positive scale keep the order
            if head.bias is not None:
                logits = logits + head.bias[: head.valid_size]
            found.append((logits if head.scale > 0 else -logits).argmax(-1))
        return [row.tolist() for row in torch.cat(found).split(self.lengths)]


class Reader:
    """One model on one list of prompts. What these have in common, a context or a template's own words, is read once;
    behind a trained prefix every prompt is read whole.

    prompts: token ids, one row per answer. adapter, path: as for `ContextTeacher`, but adapters count unless they are
    "disabled". groups: (B,) prompts of one group share a beginning (one context each); None: all of them.
    Raises InputError for a model that ContextTeacher does not take.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        adapter: str = "active",
        path: str = "auto",
        groups: Sequence[int] | None = None,
        micro_batch_tokens: int | None = MICRO_BATCH_TOKENS,
    ) -> None:
        self._model, self._prompts, self._tokens = model, prompts, micro_batch_tokens
        self._groups = list(groups or [0] * len(prompts))
        self._shared = [0] * (max(self._groups) + 1)
        self._teacher: ContextTeacher | None = None
        if adapter == "active" and virtual_tokens(model):
            self._head = LMHead.from_model(model)
            return
        contexts: list[Sequence[int]] = [[]] * len(self._shared)
        for group in set(self._groups):
            rows = [prompt for prompt, own in zip(prompts, self._groups) if own == group]
            self._shared[group] = common_prefix_length(rows)  # without a row's last token, which predicts the answer
            contexts[group] = list(rows[0][: self._shared[group]])
        try:
            self._teacher = ContextTeacher(
                model, [torch.tensor(ids, dtype=torch.int64) for ids in contexts], path=path, adapter=adapter,
                frozen_weights=True,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(str(error)) from error
        self._head = self._teacher.head

    @torch.no_grad()
    def read(self, answers: Sequence[Sequence[int]]) -> Reading:
        """answers: token ids, one row to each prompt."""
        samples = []
        for prompt, group, answer in zip(self._prompts, self._groups, answers, strict=True):
            own = prompt[self._shared[group] :]
            samples.append(Sample(own, own, group, answer))
        pieces = []
        for some in micro_batches(samples, self._tokens):
            batch = pack(some).to(next(self._model.parameters()).device)
            if self._teacher is None:
                row = batch.teacher_ids, batch.teacher_cu_seqlens
                pieces.append(packed_hidden_states(self._model, *row, select=batch.response_index_teacher))
            else:
                pieces.append(teacher_hidden_states(self._teacher, batch))
        return Reading(torch.cat(pieces), self._head, [len(answer) for answer in answers])


@dataclass(frozen=True)
class Distance:
    """On the answers to one prompt: KL of each token in nats, and where the most probable tokens agree."""

    token_kl: list[float]
    same_first: list[bool]

    @property
    def kl(self) -> float:
        return statistics.fmean(self.token_kl)


@torch.no_grad()
def distances(p: Reading, q: Reading, temperature: float, per_prompt: int = 1) -> list[Distance]:
    """KL(p || q) of two models that read the same answers, logits divided by `temperature`; one entry per prompt.

    per_prompt: how many answers, back to back, each prompt has.
    """
    head_p, head_q = same_vocabulary(p.head, q.head)
    _, stats = fused_linear_divergence(
        p.hidden, head_p, q.hidden, head_q,
        divergence="reverse_kl", temperature=temperature, reduction="sum", return_stats=True,
    )  # fmt: skip
    sizes = [sum(p.lengths[start : start + per_prompt]) for start in range(0, len(p.lengths), per_prompt)]
    kl, same = stats.token_kl.cpu().split(sizes), stats.top1_agreement.cpu().split(sizes)
    return [Distance(a.tolist(), [bool(x) for x in b]) for a, b in zip(kl, same, strict=True)]

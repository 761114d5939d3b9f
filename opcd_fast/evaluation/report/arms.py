"""Answers of the four arms to held-out prompts: base and student, each with and without the context."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.data import Message, Prompt, RenderedPrompt, whole_prompt
from opcd_fast.evaluation.report.estimates import mean, share
from opcd_fast.evaluation.report.models import ARMS, BOTH, SHOWN, RunModels
from opcd_fast.rollout import Completion
from opcd_fast.runtime import stream_seed
from opcd_fast.training.step import Windows


@dataclass(frozen=True)
class HeldOut:
    """The prompts that everything is measured on, `samples` answers each: to the first one, then to the second ..."""

    prompts: Sequence[Prompt]
    rows: Sequence[RenderedPrompt]
    prefixes: Sequence[Sequence[int]]  # the contexts of the rows
    samples: int

    def times(self, values: Sequence[Any]) -> list[Any]:
        """One for each answer, of one for each prompt."""
        return [value for value in values for _ in range(self.samples)]

    @property
    def without(self) -> list[Sequence[int]]:
        """Token ids, one row for each prompt."""
        return [row.student_ids for row in self.rows]

    @property
    def within(self) -> list[Sequence[int]]:
        """The same with the context in front."""
        return [whole_prompt(row, self.prefixes) for row in self.rows]

    def arms(self, max_new_tokens: int, windows: Windows) -> tuple[str, ...]:
        """All; without "student + context" where another model is the teacher, and the context is longer than what the
        student can read itself."""
        longest = max(map(len, self.within)) + windows.virtual + max_new_tokens
        fits = windows.student is None or longest <= windows.student
        return ARMS if fits else tuple(arm for arm in ARMS if arm != BOTH)


@dataclass(frozen=True)
class Answers:
    """One arm's answers, with what was asked and the data row of that for each."""

    completions: list[Completion]
    texts: list[str]
    messages: Sequence[Sequence[Message]]
    rows: Sequence[Mapping[str, Any]]
    per_prompt: int

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return [one.token_ids for one in self.completions]

    def by_prompt(self, values: Sequence[float]) -> list[float]:
        """Mean of each prompt's answers."""
        n = self.per_prompt
        return [statistics.fmean(values[start : start + n]) for start in range(0, len(values), n)]

    def lengths(self) -> dict[str, Any]:
        """Tokens per answer, and the share of answers that were cut at the limit."""
        counts = self.by_prompt([len(one.token_ids) for one in self.completions])
        cut = self.by_prompt([float(not one.finished) for one in self.completions])
        return {"length": mean(counts), "truncated": share(cut, self.per_prompt)}


def draw_arms(
    models: RunModels, held_out: HeldOut, arms: Sequence[str], seed: int, sampling: Mapping[str, Any]
) -> dict[str, Answers]:
    """Sampled answers of `arms`; a run with another model as teacher has that one in the arm "base + context"."""
    prompts = held_out.prompts
    messages = [prompt.chat for prompt in prompts]
    asked = (held_out.times(messages), held_out.times([prompt.row for prompt in prompts]), held_out.samples)
    drawn = {}
    for arm in arms:
        ids = held_out.times(held_out.within if arm in (SHOWN, BOTH) else held_out.without)
        completions = models.of(arm).answers(ids, seed=stream_seed(seed, f"report {arm}", 0), **sampling)
        texts = [models.tokenizer.decode(c.token_ids, skip_special_tokens=True).strip() for c in completions]
        drawn[arm] = Answers(completions, texts, *asked)
    return drawn

"""Answers of the four arms: base and student, each with and without the context."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.data import Message, Prompt, RenderedPrompt, whole_prompt
from opcd_fast.evaluation.report.models import RunModels, Side
from opcd_fast.rollout import Completion
from opcd_fast.runtime import bootstrap, stream_seed, wilson
from opcd_fast.training.step import Windows

BASE, SHOWN, STUDENT, BOTH = "base", "base + context", "student", "student + context"
ARMS = (BASE, SHOWN, STUDENT, BOTH)

Prefixes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Answers:
    """One arm's answers: `samples` to the first prompt, then to the second ..."""

    completions: list[Completion]
    texts: list[str]
    messages: Sequence[Sequence[Message]]  # what was asked, per answer
    rows: Sequence[Mapping[str, Any]]  # the data rows of that
    per_prompt: int

    @property
    def responses(self) -> list[tuple[int, ...]]:
        return [one.token_ids for one in self.completions]

    @property
    def transcripts(self) -> list[str]:
        return [transcript(messages) for messages in self.messages]

    def by_prompt(self, values: Sequence[float]) -> list[float]:
        """Mean of each prompt's answers."""
        n = self.per_prompt
        return [statistics.fmean(values[start : start + n]) for start in range(0, len(values), n)]


def transcript(messages: Sequence[Message]) -> str:
    """A chat as text; a single user message is that text alone."""
    if len(messages) == 1:
        return messages[0].get("content") or ""
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)


def arms_that_fit(
    rows: Sequence[RenderedPrompt], prefixes: Prefixes, max_new_tokens: int, windows: Windows
) -> tuple[str, ...]:
    """All arms; without "student + context" where another model is the teacher, and the context is longer than what the
    student can read itself."""
    longest = max(len(whole_prompt(row, prefixes)) for row in rows) + windows.virtual + max_new_tokens
    fits = windows.student is None or longest <= windows.student
    return ARMS if fits else tuple(arm for arm in ARMS if arm != BOTH)


def draw_arms(
    models: RunModels,
    prompts: Sequence[Prompt],
    rows: Sequence[RenderedPrompt],
    prefixes: Prefixes,
    per_prompt: int,
    seed: int,
    sampling: Mapping[str, Any],
    arms: Sequence[str] = ARMS,
) -> dict[str, Answers]:
    """Sampled answers of `arms`; a run with another model as teacher has that one in the arm "base + context"."""
    rows = [row for row in rows for _ in range(per_prompt)]
    asked = [prompt.messages or ({"role": "user", "content": prompt.text or ""},) for prompt in prompts]
    messages = [one for one in asked for _ in range(per_prompt)]
    given = [prompt.row for prompt in prompts for _ in range(per_prompt)]
    without = [row.student_ids for row in rows]
    within = [whole_prompt(row, prefixes) for row in rows]
    sides: dict[str, tuple[Side, Sequence[Sequence[int]]]] = {
        BASE: (models.base, without), SHOWN: (models.teacher, within),
        STUDENT: (models.student, without), BOTH: (models.student, within),
    }  # fmt: skip
    drawn = {}
    for arm in arms:
        side, ids = sides[arm]
        completions = side.answers(ids, seed=stream_seed(seed, f"report {arm}", 0), **sampling)
        texts = [models.tokenizer.decode(c.token_ids, skip_special_tokens=True).strip() for c in completions]
        drawn[arm] = Answers(completions, texts, messages, given, per_prompt)
    return drawn


def lengths(answers: Answers) -> dict[str, Any]:
    """Tokens per answer, and the share of answers that were cut at the limit."""
    counts = answers.by_prompt([len(one.token_ids) for one in answers.completions])
    cut = [float(not one.finished) for one in answers.completions]
    return {"length": mean(counts), "truncated": share(answers.by_prompt(cut), answers.per_prompt)}


def mean(units: Sequence[float], method: str = "bootstrap") -> dict[str, Any]:
    """Mean over prompts with its 95 % interval."""
    low, high = bootstrap(units, statistics.fmean)
    return {"value": statistics.fmean(units), "low": low, "high": high, "n": len(units), "interval": method}


def share(units: Sequence[float], per_prompt: int = 1) -> dict[str, Any]:
    """A rate with its 95 % interval. units: each prompt's share.

    Wilson's interval for one answer a prompt; several answers to one prompt are not independent, so that prompts are
    drawn again as wholes. Where all are alike that would give an interval of no width: Wilson's then, with as many
    trials as prompts.
    """
    value = statistics.fmean(units)
    if per_prompt > 1 and len(set(units)) > 1:
        return mean(units)
    if not set(units) <= {0.0, 1.0}:
        return mean(units)
    low, high = wilson(round(value * len(units)), len(units))
    return {"value": value, "low": low, "high": high, "n": len(units), "interval": "wilson"}


def greedy_answers(
    models: RunModels, rows: Sequence[RenderedPrompt], prefixes: Prefixes, max_new_tokens: int
) -> list[tuple[int, ...]]:
    """What base + context (or the run's other teacher) answers when it always takes the most probable token."""
    asked = [whole_prompt(row, prefixes) for row in rows]
    drawn = models.teacher.answers(asked, max_new_tokens=max_new_tokens, temperature=0.0)
    return [one.token_ids for one in drawn]


def identical_greedy(most_probable: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Whether a model would write the greedy answers `wanted` itself, and where it would leave them first.

    most_probable: the model's most probable token at every place of them. Along equal tokens greedy decoding sees the
    same prefixes, so that nothing has to be generated to know where it differs first.
    """
    places = [first_difference(a, b) for a, b in zip(most_probable, wanted, strict=True)]
    found = sorted(place for place in places if place is not None)
    same = share([float(place is None) for place in places])
    return {"identical": same, "first_difference": {"median": statistics.median(found) if found else None, "of": found}}


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Number of equal tokens at the beginning; None when the two are the same."""
    for place, (left, right) in enumerate(zip(a, b)):
        if left != right:
            return place
    return None if len(a) == len(b) else min(len(a), len(b))

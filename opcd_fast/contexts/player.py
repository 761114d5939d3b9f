"""A model that answers questions and plays tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opcd_fast.data import Message, Prompt
from opcd_fast.data.tasks import Played, Task
from opcd_fast.evaluation import Arm


@dataclass(frozen=True)
class Player:
    """A model that answers, and how it is sampled: max_new_tokens, temperature, top_p.

    All methods raise InputError for a chat that the template refuses, or that leaves no room in the window.
    """

    arm: Arm
    sampling: Mapping[str, Any]

    def completions(self, questions: Sequence[list[Message]], seed: int) -> list[tuple[str, bool]]:
        """Text of each answer, and whether it ended before the limit."""
        drawn = self.arm.answers([Prompt(tuple(question)) for question in questions], seed=seed, **self.sampling)
        return [(self.arm.text(one.token_ids), one.finished) for one in drawn]

    def answers(self, questions: Sequence[list[Message]], seed: int) -> list[str]:
        return [text for text, _ in self.completions(questions, seed)]

    def play(self, task: Task, episodes: Sequence[Any], seed: int, context: str | None = None) -> list[Played]:
        return replace(self.arm, context=context or None).play(task, episodes, seed=seed, **self.sampling)


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])

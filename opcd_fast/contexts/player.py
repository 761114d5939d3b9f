"""A model that answers questions and plays tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.data import Message, Prompt
from opcd_fast.data.tasks import Played, Task
from opcd_fast.evaluation import Arm
from opcd_fast.rollout import Rollout


@dataclass(frozen=True)
class Player:
    """A model's sampler, its tokenizer and how it is sampled. window: most tokens of prompt and answer; None: no limit.

    All methods raise InputError for a chat that the template refuses, or that leaves no room in the window.
    """

    rollout: Rollout
    tokenizer: Any
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    template_kwargs: Mapping[str, Any] | None = None
    window: int | None = None

    def _as_arm(self, context: str | None = None) -> Arm:
        return Arm(self.tokenizer, self.rollout.generate, context or None, self.template_kwargs, self.window)

    @property
    def _sampling(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}

    def completions(self, questions: Sequence[list[Message]], seed: int) -> list[tuple[str, bool]]:
        """Text of each answer, and whether it ended before the limit."""
        arm = self._as_arm()
        drawn = arm.answers([Prompt(tuple(question)) for question in questions], seed=seed, **self._sampling)
        return [(arm.text(one.token_ids), one.finished) for one in drawn]

    def answers(self, questions: Sequence[list[Message]], seed: int) -> list[str]:
        return [text for text, _ in self.completions(questions, seed)]

    def play(self, task: Task, episodes: Sequence[Any], seed: int, context: str | None = None) -> list[Played]:
        return self._as_arm(context).play(task, episodes, seed=seed, **self._sampling)


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])

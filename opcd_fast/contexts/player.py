"""A model that answers questions and plays tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.data import Message, Prompt, adapt_to_tokenizer, student_ids
from opcd_fast.data.tasks import Played, Task, play
from opcd_fast.rollout import Rollout


@dataclass(frozen=True)
class Player:
    """A model's sampler, its tokenizer and how it is sampled."""

    rollout: Rollout
    tokenizer: Any
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    template_kwargs: Mapping[str, Any] | None = None

    def completions(self, questions: Sequence[list[Message]], seed: int) -> list[tuple[str, bool]]:
        """Text of each answer, and whether it ended before the limit."""
        prompts = adapt_to_tokenizer(self.tokenizer, [Prompt(messages=tuple(question)) for question in questions])
        drawn = self.rollout.generate(
            [student_ids(self.tokenizer, prompt, self.template_kwargs) for prompt in prompts],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )
        return [(self.tokenizer.decode(one.token_ids, skip_special_tokens=True), one.finished) for one in drawn]

    def answers(self, questions: Sequence[list[Message]], seed: int) -> list[str]:
        return [text for text, _ in self.completions(questions, seed)]

    def play(self, task: Task, episodes: Sequence[Any], seed: int, context: str | None = None) -> list[Played]:
        return play(
            episodes, self.rollout, self.tokenizer, context=context or None, max_turns=task.max_turns,
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=seed,
        )  # fmt: skip


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])

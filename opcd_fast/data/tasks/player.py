"""Episodes played by a model, all of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.data import Message
from opcd_fast.data.tasks.episode import Episode


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    messages: list[Message]
    answer: str
    finished: bool  # the model ended it; else it was cut at the token limit
    tokens: int


@dataclass(frozen=True)
class Played:
    """A whole episode."""

    id: str
    turns: list[Turn]
    score: float
    feedback: str


def play_with(
    episodes: Sequence[Episode],
    answer: Callable[[Sequence[list[Message]], int], Sequence[Any]],
    tokenizer: Any,
    max_turns: int,
) -> list[Played]:
    """Play every episode to its end; each turn is one batch of all episodes that go on.

    answer: (what each open episode asks, turn number) -> a Completion for each. An
    episode that has no score after `max_turns` counts as 0.
    """
    turns: list[list[Turn]] = [[] for _ in episodes]
    for number in range(max_turns):
        live = [index for index, episode in enumerate(episodes) if episode.score is None]
        if not live:
            break
        asked = [episodes[index].messages() for index in live]
        for index, messages, given in zip(live, asked, answer(asked, number), strict=True):
            text = tokenizer.decode(given.token_ids, skip_special_tokens=True)
            turns[index].append(Turn(messages, text, given.finished, len(given.token_ids)))
            episodes[index].answer(text)
    return [
        Played(episode.id, played, episode.score or 0.0, episode.feedback)
        for episode, played in zip(episodes, turns, strict=True)
    ]

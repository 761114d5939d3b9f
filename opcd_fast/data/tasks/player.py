"""Episodes played by a model, all of them side by side, with or without a context in front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opcd_fast.data import Context, Message, Prompt, adapt_to_tokenizer, student_ids, teacher_ids
from opcd_fast.data.tasks.episode import Episode
from opcd_fast.runtime import stream_seed


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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def play(
    episodes: Sequence[Episode],
    rollout: Any,
    tokenizer: Any,
    *,
    context: Context | None = None,
    max_turns: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int = 0,
    told: Callable[[int, int], None] | None = None,
) -> list[Played]:
    """Play every episode to its end; each turn is one batch of all episodes that go on.

    context: put in front of every turn, as `OPCDTrainer` puts it before the teacher. told: called after each turn with
    its number and how many episodes go on. An episode that has no score after `max_turns` counts as 0.
    """

    def answer(asked: Sequence[list[Message]], number: int) -> list[Any]:
        prompts = adapt_to_tokenizer(tokenizer, [Prompt(messages=tuple(messages)) for messages in asked])
        return rollout.generate(
            [
                student_ids(tokenizer, prompt) if not context else teacher_ids(tokenizer, prompt, context)
                for prompt in prompts
            ],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=stream_seed(seed, "turn", number),
        )

    return play_with(episodes, answer, tokenizer, max_turns, told)


def play_with(
    episodes: Sequence[Episode],
    answer: Callable[[Sequence[list[Message]], int], Sequence[Any]],
    tokenizer: Any,
    max_turns: int,
    told: Callable[[int, int], None] | None = None,
) -> list[Played]:
    """`play` with answers from elsewhere: answer(what each open episode asks, turn number) -> a Completion for each."""
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
        if told is not None:
            told(number + 1, sum(episode.score is None for episode in episodes))
    return [
        Played(episode.id, played, episode.score or 0.0, episode.feedback)
        for episode, played in zip(episodes, turns, strict=True)
    ]

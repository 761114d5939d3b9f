"""How long the turns of a task get: its episodes played without a model."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from opcd_fast.data import Message, RenderedPrompt
from opcd_fast.data.tasks import play_with
from opcd_fast.rollout import Completion
from opcd_fast.training.answers import TaskPrompts

FEWEST = 64  # episodes: many end early, as moves are drawn at random
_ACTION = re.compile(r"\[[^\[\]\n]{1,40}\]")


def turns_without_a_model(
    prompts: TaskPrompts, count: int, max_new_tokens: int, seed: int
) -> tuple[RenderedPrompt, ...]:
    """All turns of `count` training episodes, `FEWEST` at least, or of all that there are.

    Every answer has `max_new_tokens` tokens, for tasks that quote it later, and ends with one of the words in brackets
    of its question, drawn at random: so do games name their moves.
    """
    tokenizer, chosen = prompts.tokenizer, random.Random(seed)
    turns: list[RenderedPrompt] = []

    def answer(asked: Sequence[Sequence[Message]], number: int) -> list[Completion]:
        turns.extend(map(prompts.row, asked))
        return [written(str(messages[-1]["content"])) for messages in asked]

    def written(question: str) -> Completion:
        action = chosen.choice(_ACTION.findall(question) or [""])
        ids = tokenizer("word " * max_new_tokens + action, add_special_tokens=False)["input_ids"]
        return Completion(tuple(ids[-max_new_tokens:]), None, True)

    episodes = prompts.task.episodes("train", max(count, FEWEST), seed=seed)
    play_with(episodes, answer, tokenizer, prompts.task.max_turns)
    return tuple(turns)

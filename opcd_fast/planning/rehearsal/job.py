"""What a run asks, as numbers of tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opcd_fast.data import Message, RenderedPrompt, common_prefix_length
from opcd_fast.data.tasks import play_with
from opcd_fast.rollout import Completion
from opcd_fast.training.answers import TaskPrompts, TrainingPrompts
from opcd_fast.training.settings import OPCDConfig

Lengths = tuple[tuple[int, int, int], ...]
FEWEST = 64  # episodes: many end early, as moves are drawn at random
_ACTION = re.compile(r"\[[^\[\]\n]{1,40}\]")


@dataclass(frozen=True)
class Job:
    """What a step has to work on: numbers of tokens.

    contexts: of each context's shared prefix. prompts: of every training prompt, for the student (whole) and for the
    teacher (after the prefix), and the context it has. held_out: the same for evaluation; empty for none. shared:
    tokens that all of the student's prompts begin with. Every answer is as long as it may be.
    turns: of each episode of a task, all of them as long as the longest. episodes: how many the student plays at an
    evaluation.
    """

    contexts: tuple[int, ...]
    prompts: Lengths
    held_out: Lengths = ()
    shared: int = 0
    turns: int = 1
    episodes: int = 0


def job_of(asked: TrainingPrompts, config: OPCDConfig) -> Job:
    """Of prompts as a run reads them. A task is played, without a model."""
    rows, turns, episodes = asked.rows, 1, 0
    if asked.task is not None:
        rows = _turns_without_a_model(asked.task, config)
        turns, episodes = asked.task.task.max_turns, config.task_episodes if config.eval_every else 0
    held_out = asked.held_out_rows if config.eval_every else ()
    shared = common_prefix_length([row.student_ids for row in rows])
    return Job(tuple(map(len, asked.prefixes)), _lengths(rows), _lengths(held_out), shared, turns, episodes)


def _lengths(rows: Iterable[RenderedPrompt]) -> Lengths:
    return tuple((len(row.student_ids), len(row.teacher_ids), row.context_index) for row in rows)


def _turns_without_a_model(prompts: TaskPrompts, config: OPCDConfig) -> tuple[RenderedPrompt, ...]:
    """All turns of a step's episodes, of `FEWEST` at least, or of all that there are.

    Every answer has its full length, for tasks that quote it later, and ends with one of the words in brackets of its
    question, drawn at random: so do games name their moves.
    """
    tokenizer, chosen, length = prompts.tokenizer, random.Random(config.seed), config.max_new_tokens
    turns: list[RenderedPrompt] = []

    def answer(asked: Sequence[Sequence[Message]], number: int) -> list[Completion]:
        turns.extend(map(prompts.row, asked))
        return [written(str(messages[-1]["content"])) for messages in asked]

    def written(question: str) -> Completion:
        action = chosen.choice(_ACTION.findall(question) or [""])
        ids = tokenizer("word " * length + action, add_special_tokens=False)["input_ids"]
        return Completion(tuple(ids[-length:]), None, True)

    count = max(config.batch_size * config.rollouts_per_prompt, FEWEST)
    play_with(prompts.task.episodes("train", count, seed=config.seed), answer, tokenizer, prompts.task.max_turns)
    return tuple(turns)

"""What a run asks, as numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opcd_fast.data import RenderedPrompt, common_prefix_length
from opcd_fast.planning.rehearsal.task_turns import turns_without_a_model
from opcd_fast.training.answers import TrainingPrompts
from opcd_fast.training.settings import OPCDConfig

Lengths = tuple[tuple[int, int, int], ...]


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
        count = config.batch_size * config.rollouts_per_prompt
        rows = turns_without_a_model(asked.task, count, config.max_new_tokens, config.seed)
        turns, episodes = asked.task.task.max_turns, config.task_episodes if config.eval_every else 0
    held_out = asked.held_out_rows if config.eval_every else ()
    shared = common_prefix_length([row.student_ids for row in rows])
    return Job(tuple(map(len, asked.prefixes)), _lengths(rows), _lengths(held_out), shared, turns, episodes)


def _lengths(rows: Iterable[RenderedPrompt]) -> Lengths:
    return tuple((len(row.student_ids), len(row.teacher_ids), row.context_index) for row in rows)

"""What a run asks: prompts of a list with its contexts, or the turns of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.data import Context, Prompt, RenderedPrompt, adapt_to_tokenizer, read_prompts, render
from opcd_fast.errors import InputError
from opcd_fast.training.answers.tasks import TaskPrompts, is_task
from opcd_fast.training.settings import OPCDConfig


@dataclass(frozen=True)
class TrainingPrompts:
    """Prompts as they were given and as models read them.

    given, held_out_given: for the run's record. held_out_shown: chats as the template shows them, for a scorer.
    rows, held_out_rows: rendered. prefixes: the contexts' tokens. task: whose first turns these are, if it is one.
    """

    given: Sequence[Prompt]
    held_out_given: Sequence[Prompt]
    held_out_shown: Sequence[Prompt]
    rows: tuple[RenderedPrompt, ...]
    held_out_rows: tuple[RenderedPrompt, ...]
    prefixes: tuple[tuple[int, ...], ...]
    task: TaskPrompts | None = None


def read_training_prompts(
    prompts: Any, eval_prompts: Any, context: Context | None, tokenizer: Any, config: OPCDConfig
) -> TrainingPrompts:
    """prompts, eval_prompts: as for `OPCDTrainer`. Raises InputError: see `read_prompts`, `render`, `TaskPrompts`."""
    if is_task(prompts):
        return _of_task(prompts, eval_prompts, context, tokenizer, config)
    if config.task_episodes != OPCDConfig.task_episodes:
        raise InputError("task_episodes is set, but the prompts are not those of a task; drop it")
    read = [read_prompts(prompts, **config.columns())]
    if eval_prompts is not None:
        read.append(read_prompts(eval_prompts, "eval_prompts", **config.columns()))
    groups = [adapt_to_tokenizer(tokenizer, group) for group in read]
    rendered, prefixes = render(tokenizer, groups, context, config.template_variables())
    if eval_prompts is None:
        return TrainingPrompts(read[0], (), (), rendered[0], (), prefixes)
    return TrainingPrompts(read[0], read[1], groups[1], rendered[0], rendered[1], prefixes)


def _of_task(
    task: Any, eval_prompts: Any, context: Context | None, tokenizer: Any, config: OPCDConfig
) -> TrainingPrompts:
    if context is None:
        raise InputError("context is missing: a task's prompts have none of their own")
    if eval_prompts is not None:
        raise InputError("eval_prompts: a task is evaluated on its own split 'selection'; drop eval_prompts")
    check_goes_with_task(config)
    held_out = config.eval_batch if config.eval_every else 0
    made = TaskPrompts(task, tokenizer, context, config.batch_size, held_out, config.template_variables())
    return TrainingPrompts(
        made.first_turns, made.held_out_turns, made.held_out_turns, made.first, made.held_out,
        made.prefixes, made,
    )  # fmt: skip


def check_goes_with_task(config: OPCDConfig) -> None:
    """Raises InputError for settings that need answers to prompts which are known beforehand."""
    if config.rollout == "replay":
        raise InputError("rollout='replay': a task's later turns depend on the answers; a file cannot have them")
    if config.kept_answers:
        raise InputError("kept_answers: a task's later turns depend on the answers, which are drawn at every step")

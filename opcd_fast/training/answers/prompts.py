"""What a run asks: prompts of a list with its contexts, or the turns of a task.

A task's turns become known as they are played, while the context's shared prefix is computed before the run:
`TaskPrompts` makes it so that it holds for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.data import (
    Context,
    Message,
    Prompt,
    RenderedPrompt,
    adapt_to_tokenizer,
    read_prompts,
    render,
    student_ids,
    teacher_ids,
)
from opcd_fast.data.tasks import Task
from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig

# Beginnings of a user's message that share no first character and merge differently with what a template puts before
# it: a prefix common to all of these is common to every message.
PROBES = ("a", "Z", "7", "?", " a", "\n", "\n\n", "\t", "(", "é", "<")


def is_task(prompts: Any) -> bool:
    return hasattr(prompts, "episodes") and hasattr(prompts, "max_turns")


class TaskPrompts:
    """Renders the turns of a task.

    first_turns, first: of `count` training episodes, as prompts and rendered; held_out_turns, held_out: of `held_out`
    episodes of the split "selection", always the same ones. prefixes: one, the tokens shared by every turn with the
    context in front.
    Raises InputError: a context that cannot be rendered, or a split with fewer than `count` episodes.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        context: Context,
        count: int,
        held_out: int,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.task, self.tokenizer, self._context = task, tokenizer, context
        self._variables = template_variables
        episodes = task.episodes("train", count)
        if len(episodes) < count:
            raise InputError(
                f"task {task.name!r} has {len(episodes)} problems in its split 'train', batch_size={count}; lower it"
            )
        turns = [episode.messages() for episode in episodes]
        probes = [[*turns[0][:-1], {**turns[0][-1], "content": text}] for text in PROBES]
        later = [episode.messages() for episode in task.episodes("selection", held_out)] if held_out else []
        self.first_turns, self.held_out_turns, probing = (self._prompts(part) for part in (turns, later, probes))
        groups = [self.first_turns, self.held_out_turns, probing]
        rendered, self.prefixes = render(tokenizer, groups, context, template_variables)
        self.first, self.held_out, _ = rendered

    def row(self, messages: Sequence[Message]) -> RenderedPrompt:
        """A turn as student and teacher see it. Raises InputError where the shared prefix does not hold."""
        (prompt,) = self._prompts([messages])
        whole = tuple(teacher_ids(self.tokenizer, prompt, self._context, self._variables))
        prefix = self.prefixes[0]
        if whole[: len(prefix)] != prefix or len(whole) == len(prefix):
            raise InputError(
                f"task {self.task.name!r}: a turn with the context in front does not begin with the {len(prefix)} "
                "tokens that all others share; its messages before the last one differ from those of the first turns"
            )
        return RenderedPrompt(tuple(student_ids(self.tokenizer, prompt, self._variables)), whole[len(prefix) :], 0)

    def _prompts(self, turns: Sequence[Sequence[Message]]) -> list[Prompt]:
        return adapt_to_tokenizer(self.tokenizer, [Prompt(messages=tuple(messages)) for messages in turns])


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
    later = made.held_out_turns
    return TrainingPrompts(made.first_turns, later, later, made.first, made.held_out, made.prefixes, made)


def check_goes_with_task(config: OPCDConfig) -> None:
    """Raises InputError for settings that need answers to prompts which are known beforehand."""
    if config.rollout == "replay":
        raise InputError("rollout='replay': a task's later turns depend on the answers; a file cannot have them")
    for name in ("off_policy_share", "answer_growth"):
        if getattr(config, name):
            raise InputError(f"{name}: the turns of a task are played by one, with whole answers; drop {name}")
    if config.kept_answers:
        raise InputError("kept_answers: a task's later turns depend on the answers, which are drawn at every step")

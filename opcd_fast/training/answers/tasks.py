"""A task as the source of training prompts: episodes are played, and every turn is one prompt with its answer.

That each turn is a sample of its own is how arXiv 2602.12275 trains on games. Turns become known as they are played,
while the context's shared prefix is computed before the run: `TaskPrompts` makes it so that it holds for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opcd_fast.data import (
    Context,
    Message,
    Prompt,
    RenderedPrompt,
    adapt_to_tokenizer,
    render,
    student_ids,
    teacher_ids,
)
from opcd_fast.data.tasks import Episode, Played, Task, play_with
from opcd_fast.errors import InputError
from opcd_fast.rollout import Completion
from opcd_fast.runtime import stream_seed, wilson
from opcd_fast.training.answers.sources import AnswerSource, Drawn, Sampling, Writer, scored
from opcd_fast.training.step import Windows, check_lengths

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
        return RenderedPrompt(
            tuple(student_ids(self.tokenizer, prompt, self._variables)), whole[len(prefix) :], 0
        )

    def _prompts(self, turns: Sequence[Sequence[Message]]) -> list[Prompt]:
        return adapt_to_tokenizer(self.tokenizer, [Prompt(messages=tuple(messages)) for messages in turns])


class TaskAnswers(AnswerSource):
    """Plays `count` episodes of the split "train" at each step, `repeats` times each; see `AnswerSource`.

    write: who plays. windows: of student and teacher, for the turns that only the run brings.
    student_writes: who plays `held_out` episodes of the split "selection" at evaluations.
    """

    def __init__(
        self,
        prompts: TaskPrompts,
        count: int,
        repeats: int,
        write: Writer,
        sampling: Callable[[str, int], Sampling],
        of_student: bool,
        seed: int,
        windows: Windows,
        student_writes: Writer,
        held_out: int,
    ) -> None:
        self._prompts, self._count, self._repeats = prompts, count, repeats
        self._write, self._sampling, self._of_student = write, sampling, of_student
        self._seed, self._windows = seed, windows
        self._student_writes, self._held_out = student_writes, held_out

    def draw(self, step: int) -> Drawn:
        task = self._prompts.task
        own = stream_seed(self._seed, "episodes", step)
        episodes = [episode for _ in range(self._repeats) for episode in task.episodes("train", self._count, seed=own)]
        rows, answers, played = self._play(episodes, self._write, self._sampling("rollout", step))
        more = {"episodes": len(played), "train_task_score": sum(one.score for one in played) / len(played)}
        return Drawn(scored(rows, answers, self._of_student), answers, more)

    def evaluate(self) -> dict[str, Any]:
        if not self._held_out:
            return {}
        return self.score(self._student_writes, "selection", self._held_out, self._sampling("task", 0))

    def score(self, write: Writer, split: str, count: int, sampling: Sampling) -> dict[str, Any]:
        """Mean score of `count` episodes, always the same ones, with a 95 % interval (Wilson's, episodes as trials;
        for scores between 0 and 1 it is too wide, never too narrow)."""
        _, _, played = self._play(self._prompts.task.episodes(split, count), write, sampling)
        total = sum(one.score for one in played)
        low, high = wilson(round(total), len(played))
        return {
            "task_score": total / len(played), "task_score_low": low, "task_score_high": high,
            "task_episodes": len(played),
        }  # fmt: skip

    def _play(
        self, episodes: Sequence[Episode], write: Writer, sampling: Sampling
    ) -> tuple[list[RenderedPrompt], list[Completion], list[Played]]:
        rows: list[RenderedPrompt] = []
        answers: list[Completion] = []

        def answer(asked: Sequence[Sequence[Message]], number: int) -> list[Completion]:
            turn = [self._prompts.row(messages) for messages in asked]
            check_lengths(turn, self._prompts.prefixes, sampling["max_new_tokens"], self._windows)
            written = write(turn, {**sampling, "seed": stream_seed(sampling["seed"], "turn", number)})
            rows.extend(turn)
            answers.extend(written)
            return written

        played = play_with(episodes, answer, self._prompts.tokenizer, self._prompts.task.max_turns)
        return rows, answers, played

"""Whose answers a run learns from, and what is minimised on them: the settings `answers` and `objective` at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from opcd_fast.data import RenderedPrompt, whole_prompt
from opcd_fast.rollout import Completion, Rollout, TransformersRollout
from opcd_fast.training.answers.prompts import TrainingPrompts
from opcd_fast.training.answers.sources import AnswerSource, KeptAnswers, PromptAnswers, Sampling, Writer
from opcd_fast.training.answers.tasks import TaskAnswers
from opcd_fast.training.engines import ModelPair, Ranks
from opcd_fast.training.settings import OPCDConfig, settings_with
from opcd_fast.training.step import Windows, answer_nll, context_kl


class TeacherWriter:
    """Answers with the context in front, written by what the student learns from, with its weights at that moment.

    first: the first weights' sampler, used `with first_weights()`. of_student: the student's. shared: makes a sampler
    one that all ranks use together.
    """

    def __init__(
        self,
        config: OPCDConfig,
        pair: ModelPair,
        prefixes: Sequence[Sequence[int]],
        first: Rollout | None,
        first_weights: Callable[[], AbstractContextManager[Any]],
        of_student: Rollout,
        shared: Callable[[Any], Any] = lambda sampler: sampler,
        **common: Any,
    ) -> None:
        self._prefixes, self._model, self._shared = prefixes, pair.teacher, shared
        self._rollout, self._weights = first, first_weights
        if config.teacher_mode != "frozen":
            self._rollout, self._weights = of_student, nullcontext
            if pair.teacher is not pair.student:  # an average or a copy
                self._rollout = TransformersRollout(
                    pair.teacher, max_batch=config.rollout_batch, merge_adapter=False, **common
                )

    def __call__(self, rows: Sequence[RenderedPrompt], sampling: Sampling) -> list[Completion]:
        assert self._rollout is not None, "a frozen teacher's first weights are always kept"
        with self._weights():
            rollout = self._shared(self._rollout)
            rollout.sync(self._model)
            return rollout.generate([whole_prompt(row, self._prefixes) for row in rows], **sampling)


def answer_source(
    config: OPCDConfig,
    folder: Path,
    asked: TrainingPrompts,
    rows_of: Callable[[int], Sequence[RenderedPrompt]],
    student: Writer,
    teacher: Writer,
    sampling: Callable[[str, int], Sampling],
    windows: Windows,
    ranks: Ranks,
) -> AnswerSource:
    """folder: the run's. rows_of: the prompts of a step, where they are not a task's turns. sampling: keywords of a
    purpose and step. windows: of student and teacher."""
    own = config.answers == "student"
    write = student if own else teacher
    if asked.task is not None:
        return TaskAnswers(
            asked.task, config.batch_size, config.rollouts_per_prompt, write, sampling, own, config.seed,
            windows, student, config.task_episodes,
        )  # fmt: skip
    if config.kept_answers:
        return KeptAnswers(folder, asked.rows, config.kept_answers, rows_of, write, sampling, config.seed, ranks)
    return PromptAnswers(rows_of, write, sampling, own)


def objective_of(config: OPCDConfig, weigh: bool = True) -> Callable[..., Any]:
    """`context_kl` with the run's divergence and correction, or `answer_nll`; called alike. weigh: False without the
    correction, for a filler, whose answer nobody drew."""
    if config.objective == "nll":
        return answer_nll
    return partial(
        context_kl,
        divergence={name: getattr(config, name) for name in settings_with(belongs="divergence")},
        correction=config.importance_correction if weigh else "none",
        clip=config.importance_clip,
    )


def described(config: OPCDConfig) -> dict[str, str]:
    """Of a step's record: what its `loss` is, and of whose answers."""
    objective = config.divergence if config.objective == "divergence" else config.objective
    return {"objective": objective, "answers_of": "file" if config.rollout == "replay" else config.answers}

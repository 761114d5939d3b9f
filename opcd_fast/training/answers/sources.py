"""Where a step's answers come from: what is asked, and who answers.

    PromptAnswers   prompts of a list in the order of the run, fresh answers at every step
    MixedAnswers    the same, some of them by the teacher
    KeptAnswers     the same prompts, answers drawn once before the first step and kept on disk
    TaskAnswers     episodes of a task, every turn of which is one prompt with its answer
"""

from __future__ import annotations

import json
import math
import random
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opcd_fast.data import Message, RenderedPrompt, Sample, prompts_of_step
from opcd_fast.data.tasks import Episode, Played, play_with
from opcd_fast.errors import InputError
from opcd_fast.rollout import Completion
from opcd_fast.runtime import stream_seed, wilson, write_text
from opcd_fast.training.answers.prompts import TaskPrompts, TrainingPrompts
from opcd_fast.training.engines import Ranks
from opcd_fast.training.run import ANSWERS
from opcd_fast.training.settings import OPCDConfig
from opcd_fast.training.step import Windows, check_lengths, samples_of

FILE, KEPT_COUNTS = ANSWERS

Sampling = Mapping[str, Any]  # keywords of `Rollout.generate`
Writer = Callable[[Sequence[RenderedPrompt], Sampling], list[Completion]]
"""Answers prompts, in order: the student without the context, or the teacher with it."""


def sampling_of(config: OPCDConfig, purpose: str, index: int) -> dict[str, Any]:
    """How a run samples for one of its purposes, the same every time."""
    return {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "seed": stream_seed(config.seed, purpose, index),
    }


def answer_source(
    config: OPCDConfig, asked: TrainingPrompts, windows: Windows, ranks: Ranks, *, student: Writer, teacher: Writer
) -> AnswerSource:
    """windows: of student and teacher. student, teacher: who may be asked to write."""
    write = student if config.answers == "student" else teacher
    if asked.task is not None:
        return TaskAnswers(config, asked.task, write, student, windows)
    if config.kept_answers:
        return KeptAnswers(config, asked.rows, write, ranks)
    if config.teacher_writes and config.answers == "student":
        return MixedAnswers(config, asked.rows, student, teacher)
    return PromptAnswers(config, asked.rows, write)


@dataclass(frozen=True)
class Drawn:
    """One step's answers: what is scored, and as they were sampled, in the same order. `more` joins its record."""

    samples: list[Sample]
    answers: list[Completion]
    more: dict[str, Any] = field(default_factory=dict)


class AnswerSource(ABC):
    """What the loop asks for; any step can be asked for on its own."""

    def __init__(self, config: OPCDConfig, write: Writer) -> None:
        self._config, self._write = config, write

    def prepare(self, step: int) -> None:
        """Called once, before the first step (0) or where a run goes on after `step` steps."""
        return

    @abstractmethod
    def draw(self, step: int) -> Drawn:
        """Answers for optimizer step number `step` + 1."""

    def evaluate(self) -> dict[str, Any]:
        """What a held-out evaluation of the student as it is now has besides its distances."""
        return {}

    def _drawn(self, rows: Sequence[RenderedPrompt], answers: list[Completion], **more: Any) -> Drawn:
        """Prompts and answers, paired in order. Those of a teacher lose their log-probabilities, which belong to
        another distribution than the one that is trained."""
        samples = samples_of(rows, answers)
        if self._config.answers != "student":
            samples = [replace(sample, logprobs=None) for sample in samples]
        return Drawn(samples, answers, more)


class PromptAnswers(AnswerSource):
    """Fresh answers to each step's prompts."""

    def __init__(self, config: OPCDConfig, prompts: Sequence[RenderedPrompt], write: Writer) -> None:
        super().__init__(config, write)
        self._all = prompts

    def rows_of(self, step: int) -> list[RenderedPrompt]:
        """The prompts of a step, every one as often as it gets an answer."""
        config = self._config
        return prompts_of_step(self._all, step, config.batch_size, config.rollouts_per_prompt, config.seed)

    def sampling_at(self, step: int) -> dict[str, Any]:
        """With the bound that `answer_growth` has reached."""
        config, sampling = self._config, sampling_of(self._config, "rollout", step)
        if config.answer_growth:
            grown = min(1.0, (step + 1) / (config.answer_growth * config.steps))
            sampling["max_new_tokens"] = math.ceil(grown * config.max_new_tokens)
        return sampling

    def draw(self, step: int) -> Drawn:
        rows, sampling = self.rows_of(step), self.sampling_at(step)
        return self._drawn(rows, self._write(rows, sampling), **self._bound(sampling))

    def _bound(self, sampling: Sampling) -> dict[str, Any]:
        return {"max_new_tokens": sampling["max_new_tokens"]} if self._config.answer_growth else {}


class MixedAnswers(PromptAnswers):
    """`off_policy_share` of the answers are the teacher's: GKD's lambda (arXiv 2306.13649), drawn for each row of a
    step by itself."""

    def __init__(self, config: OPCDConfig, prompts: Sequence[RenderedPrompt], student: Writer, teacher: Writer) -> None:
        super().__init__(config, prompts, student)
        self._teacher = teacher

    def draw(self, step: int) -> Drawn:
        config, rows = self._config, self.rows_of(step)
        sampling = self.sampling_at(step)
        chance = random.Random(stream_seed(config.seed, "off-policy", step))
        off = [chance.random() < config.off_policy_share for _ in rows]
        taught = iter(self._teacher([row for row, one in zip(rows, off) if one], sampling))
        own = iter(self._write([row for row, one in zip(rows, off) if not one], sampling))
        # The teacher's log-probabilities are not those of the distribution that is trained: they become NaN.
        unknown = (replace(answer, logprobs=(math.nan,) * len(answer.token_ids)) for answer in taught)
        answers = [next(unknown if one else own) for one in off]
        name = "teacher" if config.off_policy_share == 1 else "both"
        more = {**self._bound(sampling), "off_policy_answers": sum(off), "answers_of": name}
        return self._drawn(rows, answers, **more)


class KeptAnswers(PromptAnswers):
    """`kept_answers` answers to every prompt, drawn before the first step and written to answers.jsonl of the run.

    What that took is in answers.json beside it.

    A line is {"prompt_ids", "response_ids", "finished"}: the student's prompt, so that the file can be given to another
    run. Which of a prompt's answers comes first in a step is drawn; a prompt that comes again in it gets the next one.
    """

    def __init__(self, config: OPCDConfig, prompts: Sequence[RenderedPrompt], write: Writer, ranks: Ranks) -> None:
        super().__init__(config, prompts, write)
        self._file = Path(config.output_dir) / FILE
        self._prompts = [row for row in dict.fromkeys(prompts) for _ in range(config.kept_answers)]
        self._ranks = ranks
        self._kept: dict[RenderedPrompt, list[Completion]] = {}

    def prepare(self, step: int) -> None:
        """Draw the answers, or read those that are there. Raises InputError for a file that does not fit, or a run
        that goes on without one. A run's start removes the file of an earlier one."""
        if self._ranks.on_main(lambda: bool(step) or self._file.is_file()):
            answers = self._ranks.on_main(self._read)
        else:
            started = time.perf_counter()
            answers = self._write(self._prompts, sampling_of(self._config, "kept answers", 0))
            self._ranks.on_main(lambda: self._save(answers, time.perf_counter() - started))
        for row, answer in zip(self._prompts, answers, strict=True):
            self._kept.setdefault(row, []).append(answer)

    def draw(self, step: int) -> Drawn:
        rows = self.rows_of(step)
        first, seen = stream_seed(self._config.seed, "kept answer", step), Counter[RenderedPrompt]()
        answers = []
        for row in rows:
            answers.append(self._kept[row][(first + seen[row]) % self._config.kept_answers])
            seen[row] += 1
        return self._drawn(rows, answers)

    def _save(self, answers: Sequence[Completion], seconds: float) -> None:
        lines = [
            {"prompt_ids": row.student_ids, "response_ids": answer.token_ids, "finished": answer.finished}
            for row, answer in zip(self._prompts, answers, strict=True)
        ]
        tokens = sum(len(answer.token_ids) for answer in answers)
        counts = {"answers": len(answers), "response_tokens": tokens, "seconds": round(seconds, 4)}
        write_text(self._file.with_name(KEPT_COUNTS), json.dumps(counts) + "\n")
        write_text(self._file, "".join(json.dumps(line) + "\n" for line in lines))

    def _read(self) -> list[Completion]:
        try:
            rows = [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]
            found = [Completion(tuple(row["response_ids"]), (), row["finished"]) for row in rows]
            same = [tuple(row["prompt_ids"]) for row in rows] == [row.student_ids for row in self._prompts]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"resume: {str(self._file)!r} cannot be read ({error}); start the run anew") from error
        if not same:
            raise InputError(f"resume: {str(self._file)!r} has answers to other prompts; start the run anew")
        return found


class TaskAnswers(AnswerSource):
    """Plays `batch_size` episodes of the split "train" at each step, `rollouts_per_prompt` times each. That each turn
    is a sample of its own is how arXiv 2602.12275 trains on games.

    write: who plays. student: who plays `task_episodes` episodes of the split "selection" at evaluations. windows: of
    student and teacher, for the turns that only the run brings.
    """

    def __init__(
        self, config: OPCDConfig, prompts: TaskPrompts, write: Writer, student: Writer, windows: Windows
    ) -> None:
        super().__init__(config, write)
        self._prompts, self._student, self._windows = prompts, student, windows

    def draw(self, step: int) -> Drawn:
        config, task = self._config, self._prompts.task
        own = stream_seed(config.seed, "episodes", step)
        repeats = (task.episodes("train", config.batch_size, seed=own) for _ in range(config.rollouts_per_prompt))
        episodes = [episode for repeat in repeats for episode in repeat]
        rows, answers, played = self._play(episodes, self._write, sampling_of(config, "rollout", step))
        score = sum(one.score for one in played) / len(played)
        return self._drawn(rows, answers, episodes=len(played), train_task_score=score)

    def evaluate(self) -> dict[str, Any]:
        episodes = self._config.task_episodes
        if not episodes:
            return {}
        return self.score(self._student, "selection", episodes, sampling_of(self._config, "task", 0))

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

"""Where a step's answers come from: prompts of a list, and whoever answers them.

    PromptAnswers   prompts in the order of the run, fresh answers at every step
    KeptAnswers     the same prompts, answers drawn once before the first step and kept on disk

`opcd_fast.training.answers.tasks` has the third, episodes of a task.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opcd_fast.data import RenderedPrompt, Sample
from opcd_fast.errors import InputError
from opcd_fast.rollout import Completion
from opcd_fast.runtime import stream_seed, write_text
from opcd_fast.training.engines import Ranks
from opcd_fast.training.run import ANSWERS
from opcd_fast.training.step import samples_of

FILE, KEPT_COUNTS = ANSWERS

Sampling = Mapping[str, Any]  # keywords of `Rollout.generate`
Writer = Callable[[Sequence[RenderedPrompt], Sampling], list[Completion]]
"""Answers prompts, in order: the student without the context, or the teacher with it."""


@dataclass(frozen=True)
class Drawn:
    """One step's answers: what is scored, and as they were sampled, in the same order. `more` joins its record."""

    samples: list[Sample]
    answers: list[Completion]
    more: dict[str, Any] = field(default_factory=dict)


class AnswerSource(ABC):
    """What the loop asks for; any step can be asked for on its own."""

    def prepare(self, step: int) -> None:
        """Called once, before the first step (0) or where a run goes on after `step` steps."""
        return

    @abstractmethod
    def draw(self, step: int) -> Drawn:
        """Answers for optimizer step number `step` + 1."""

    def evaluate(self) -> dict[str, Any]:
        """What a held-out evaluation of the student as it is now has besides its distances."""
        return {}


class PromptAnswers(AnswerSource):
    """Fresh answers to each step's prompts.

    of_student: the answers are the student's own. Those of a teacher lose their log-probabilities, which belong to
    another distribution than the one that is trained.
    """

    def __init__(
        self,
        rows_of: Callable[[int], Sequence[RenderedPrompt]],
        write: Writer,
        sampling: Callable[[str, int], Sampling],
        of_student: bool = True,
    ) -> None:
        self._rows_of, self._write, self._sampling, self._of_student = rows_of, write, sampling, of_student

    def draw(self, step: int) -> Drawn:
        rows = self._rows_of(step)
        answers = self._write(rows, self._sampling("rollout", step))
        return Drawn(scored(rows, answers, self._of_student), answers)


class KeptAnswers(AnswerSource):
    """`count` answers to every prompt, drawn before the first step and written to `folder`/answers.jsonl.

    What that took is in answers.json beside it.

    A line is {"prompt_ids", "response_ids", "finished"}: the student's prompt, so that the file can be given to another
    run. Which of a prompt's answers comes first in a step is drawn; a prompt that comes again in it gets the next one.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[RenderedPrompt],
        count: int,
        rows_of: Callable[[int], Sequence[RenderedPrompt]],
        write: Writer,
        sampling: Callable[[str, int], Sampling],
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._file = folder / FILE
        self._prompts = [row for row in dict.fromkeys(prompts) for _ in range(count)]
        self._count, self._rows_of, self._write = count, rows_of, write
        self._sampling, self._seed, self._ranks = sampling, seed, ranks
        self._kept: dict[RenderedPrompt, list[Completion]] = {}

    def prepare(self, step: int) -> None:
        """Draw the answers, or read those that are there. Raises InputError for a file that does not fit, or a run
        that goes on without one. A run's start removes the file of an earlier one."""
        if self._ranks.on_main(lambda: bool(step) or self._file.is_file()):
            answers = self._ranks.on_main(self._read)
        else:
            started = time.perf_counter()
            answers = self._write(self._prompts, self._sampling("kept answers", 0))
            self._ranks.on_main(lambda: self._save(answers, time.perf_counter() - started))
        for row, answer in zip(self._prompts, answers, strict=True):
            self._kept.setdefault(row, []).append(answer)

    def draw(self, step: int) -> Drawn:
        rows = self._rows_of(step)
        first, seen = stream_seed(self._seed, "kept answer", step), Counter[RenderedPrompt]()
        answers = []
        for row in rows:
            answers.append(self._kept[row][(first + seen[row]) % self._count])
            seen[row] += 1
        return Drawn(scored(rows, answers, of_student=False), answers)

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


def scored(rows: Sequence[RenderedPrompt], answers: Sequence[Completion], of_student: bool) -> list[Sample]:
    """Prompts and answers, paired in order, ready to be scored by student and teacher."""
    samples = samples_of(rows, answers)
    return samples if of_student else [replace(sample, logprobs=None) for sample in samples]

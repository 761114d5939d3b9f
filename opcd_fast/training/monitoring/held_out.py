"""Held-out evaluation in the course of a run: on the student's own answers, and on the same sequences every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opcd_fast.data import RenderedPrompt, Sample
from opcd_fast.rollout import Completion
from opcd_fast.runtime import Stopwatch
from opcd_fast.training.run import RunFolder
from opcd_fast.training.step import Teacher, divergence, samples_of


def fixed_sequences(
    folder: RunFolder, rows: Sequence[RenderedPrompt], write: Callable[[Sequence[RenderedPrompt]], list[Completion]]
) -> list[Sample]:
    """Answers that the teacher's first weights `write` with the context; kept on disk, the same for the whole run."""
    kept = folder.read_samples()
    if kept is None:
        kept = samples_of(rows, write(rows))
        folder.write_samples(kept)
    return kept


def held_out_record(
    step: int, rows: Sequence[RenderedPrompt], answers: Sequence[Completion], fixed: Sequence[Sample], student: Any,
    reference: Teacher, *, watch: Stopwatch, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Divergence of `student` from `reference` on its own `answers` (`own_…`) and on `fixed` ones (`fixed_…`). watch:
    gets the seconds of the latter, in which nothing happens once. options: those of `evaluate.divergence`."""
    record: dict[str, Any] = {"step": step, "kind": "evaluation"}
    for name, samples in (("own", samples_of(rows, answers)), ("fixed", fixed)):
        measured = divergence(
            samples, student, reference, stopwatch=watch if name == "fixed" else None, **options
        )  # fmt: skip
        record.update({f"{name}_{key}": value for key, value in measured.items()})
    record["response_length"] = sum(len(answer.token_ids) for answer in answers) / len(answers)
    return record


def in_words(record: Mapping[str, Any]) -> str:
    """One line for the display."""
    line = (
        f"held-out after step {record['step']}: KL {record['own_kl']:.4f} on its own answers, "
        f"{record['fixed_kl']:.4f} on the teacher's; top-1 agreement {record['own_top1_agreement']:.1%}"
    )
    if "score" in record:
        line += f"; score {record['score']:.3f} ({record['score_low']:.3f} to {record['score_high']:.3f})"
    if "task_score" in record:
        line += f"; task {record['task_score']:.3f} ({record['task_score_low']:.3f} to {record['task_score_high']:.3f})"
    return line

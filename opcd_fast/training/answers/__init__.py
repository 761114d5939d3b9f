"""Which prompts, and whose answers, a step trains on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "choice": ("TeacherWriter", "answer_source", "described", "objective_of"),
        "prompts": ("TrainingPrompts", "check_goes_with_task", "read_training_prompts"),
        "sources": ("KEPT_COUNTS",),
        "tasks": ("TaskPrompts", "is_task"),
    },
)

if TYPE_CHECKING:
    from opcd_fast.training.answers.choice import TeacherWriter, answer_source, described, objective_of
    from opcd_fast.training.answers.prompts import TrainingPrompts, check_goes_with_task, read_training_prompts
    from opcd_fast.training.answers.sources import KEPT_COUNTS
    from opcd_fast.training.answers.tasks import TaskPrompts, is_task

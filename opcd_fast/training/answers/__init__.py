"""Which prompts, and whose answers, a step trains on."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.training.answers.prompts import (
        TaskPrompts, TrainingPrompts, check_goes_with_task, is_task, read_training_prompts,
    )  # fmt: skip
    from opcd_fast.training.answers.sources import KEPT_COUNTS, AnswerSource, answer_source, sampling_of

__getattr__, __dir__, __all__ = door(__name__)

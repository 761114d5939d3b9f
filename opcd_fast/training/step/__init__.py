"""One step: teachers, objective, likelihoods, evaluation, its numbers."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.training.step.evaluate import divergence, samples_of
    from opcd_fast.training.step.objective import (
        Teacher, answer_nll, context_kl, objective_of, present_head, teacher_hidden_states,
    )  # fmt: skip
    from opcd_fast.training.step.preflight import (
        Windows, check_context_matters, check_length, check_lengths, check_prompt_length, warn_of_known_prompts,
        warn_of_thinking,
    )  # fmt: skip
    from opcd_fast.training.step.records import step_record
    from opcd_fast.training.step.teachers import Teachers

__getattr__, __dir__, __all__ = door(__name__)

"""What can be found out before a run writes or samples anything."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from opcd_fast.data import RenderedPrompt, Sample, pack
from opcd_fast.errors import InputError
from opcd_fast.models import seam
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training.step.objective import context_kl

logger = logging.getLogger("opcd_fast")
PROBES = 8  # prompts looked at


def check_prompt_length(prompt: int, max_new_tokens: int, window: int | None) -> None:
    """Refuse a prompt that leaves no room for the answer in the model's window (None: no limit). Raises InputError."""
    if window is not None and prompt + max_new_tokens > window:
        raise InputError(
            f"prompt of {prompt} tokens plus max_new_tokens={max_new_tokens} exceeds the model's window of "
            f"{window} by {prompt + max_new_tokens - window}; shorten the prompt or max_new_tokens"
        )


@dataclass(frozen=True)
class Windows:
    """The longest inputs of a run's models, in tokens; None: no limit. `virtual`: of the student's trained prefix."""

    student: int | None
    teacher: int | None
    virtual: int = 0

    @classmethod
    def of(cls, student: Any, teacher: Any, virtual: int = 0) -> Windows:
        """Of two transformers models, which may be one."""
        own, other = (seam.longest_input(seam.body_of(model)) for model in (student, teacher))
        return cls(own, other, virtual)


def check_lengths(
    rows: Sequence[RenderedPrompt], prefixes: Sequence[Sequence[int]], max_new_tokens: int, windows: Windows
) -> None:
    """Nothing is ever truncated: what does not fit a model's window is refused, with the counts. Raises InputError."""
    for row in rows:
        prefix = len(prefixes[row.context_index])
        check_length(len(row.student_ids), prefix, len(row.teacher_ids), max_new_tokens, windows)


def check_length(prompt: int, prefix: int, suffix: int, max_new_tokens: int, windows: Windows) -> None:
    """The same of one prompt, in tokens: the student's, and the teacher's shared prefix and the rest."""
    check_prompt_length(prompt + windows.virtual, max_new_tokens, windows.student)
    whole = prefix + suffix
    if windows.teacher is not None and whole + max_new_tokens > windows.teacher:
        raise InputError(
            f"context and prompt of {whole} tokens (shared prefix {prefix}) plus max_new_tokens={max_new_tokens} "
            f"exceed the teacher's window of {windows.teacher} by {whole + max_new_tokens - windows.teacher}; "
            "shorten the context or max_new_tokens"
        )


def warn_of_known_prompts(rows: Sequence[RenderedPrompt], held_out: Sequence[RenderedPrompt]) -> None:
    """Says in the log how many of the held-out prompts are trained on."""
    trained_on = set(rows)
    known = sum(row in trained_on for row in held_out)
    if known:
        logger.warning(
            "%d of %d held-out prompts are among the training prompts: what is measured on them, also for save_best "
            "and early stop, says nothing about other prompts",
            known, len(held_out),
        )  # fmt: skip


def warn_of_thinking(tokenizer: Any, row: RenderedPrompt, variables: Mapping[str, Any]) -> None:
    """Says in the log when the model will think before it answers `row`.

    A context that only the teacher sees lowered the accuracy of thinking models by up to 17 % (arXiv 2607.05184).
    """
    end = tokenizer.decode(list(row.student_ids)[-20:]).rstrip()
    can = "enable_thinking" in str(getattr(tokenizer, "chat_template", ""))
    if end.endswith("<think>") or (can and variables.get("enable_thinking", True) and not end.endswith("</think>")):
        logger.warning(
            "this model thinks before it answers, and a context that only the teacher sees can make such a model worse "
            "at reasoning: measure that, or set chat_template_kwargs='{\"enable_thinking\": false}'"
        )


@torch.no_grad()
def check_context_matters(
    rows: Sequence[RenderedPrompt],
    teacher: ContextTeacher,
    adapter: str,
    **loss_options: Any,
) -> None:
    """Compare the teacher with and without the context where the first answer token is predicted.

    The difference must be larger than what rounding makes of no difference at all, which is measured the same way
    with an empty context. Both run where the teacher's model is.

    Raises InputError: a context without effect, weights that give no finite numbers, or settings that the loss or the
    teacher refuses.
    """
    probes = [row for row in rows if row.has_context][:PROBES]
    with_context = [Sample(row.student_ids, row.teacher_ids, row.context_index, (0,)) for row in probes]
    without = [Sample(row.student_ids, row.student_ids, 0, (0,)) for row in probes]
    model, device = teacher.model, next(teacher.model.parameters()).device
    if device.type == "cpu" and loss_options.get("backend") == "triton":  # a teacher on the CPU, a student on a GPU
        loss_options["backend"] = "auto"
    base_weights = seam.without_adapters(model) if adapter == "disabled" else nullcontext()

    def difference(samples: list[Sample], reader: ContextTeacher) -> float:
        batch = pack(samples).to(device)
        return float(context_kl(batch, model, reader, denominator=len(samples), **loss_options)[0])

    try:
        with base_weights, seam.scoring_mode(model):
            effect = difference(with_context, teacher)
            options: dict[str, Any] = {"path": teacher.path, "adapter": adapter, "autocast": teacher.autocast}
            rounding = difference(without, ContextTeacher(model, [[]], frozen_weights=True, **options))
    except ValueError as error:
        raise InputError(str(error)) from error
    if not math.isfinite(effect) or not math.isfinite(rounding):
        raise InputError("the model's logits are not finite before any training; its weights are damaged or overflow")
    if effect <= max(2 * rounding, 1e-9):
        raise InputError(
            f"context changes nothing: the teacher's KL with and without it is {effect:.1e} (rounding alone: "
            f"{rounding:.1e}); check that the context reaches the model's prompt"
        )

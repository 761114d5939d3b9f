"""One training step on tensors without data: what it holds at its worst moment, phase by phase."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from opcd_fast.errors import InputError
from opcd_fast.planning.rehearsal.job import Job
from opcd_fast.planning.rehearsal.meter import Meter, Peak
from opcd_fast.planning.rehearsal.stage import stage
from opcd_fast.planning.rehearsal.step import Step
from opcd_fast.training.engines import ModelPair, is_peft, refuse_useless_offload, student_and_teacher
from opcd_fast.training.settings import OPCDConfig

CPU = torch.device("cpu")


@dataclass
class Rehearsal:
    """`peaks`: bytes and parts of the worst moment of each phase, weights and everything kept included."""

    peaks: dict[str, Peak] = field(default_factory=dict)
    path: str = ""
    """How the teacher reads its contexts."""
    rollout_batch: int = 0
    """Sequences generated at once; 0 when that happens elsewhere."""
    tokens: int = 0
    """Student plus teacher tokens of the largest micro-batch."""
    longest: int = 0
    """The same of the longest sequence alone."""
    notes: tuple[str, ...] = ()
    """What about this model is not known exactly."""

    @property
    def worst(self) -> str:
        return max(self.peaks, key=lambda phase: self.peaks[phase].nbytes)

    @property
    def nbytes(self) -> int:
        return self.peaks[self.worst].nbytes


def rehearse(
    config: OPCDConfig,
    job: Job,
    student: Any,
    teacher: Any = None,
    *,
    device: str,
    dtype: torch.dtype,
    backend: str,
    limit: int | None = None,
    layers: int | None = None,
) -> Rehearsal:
    """A step of a run with these settings, as `OPCDTrainer` makes it from its second step on.

    student, teacher: transformers configurations; left as they are. device: "cuda" or
    "cpu", where the run will be; it need not be here. dtype: the compute type. backend: of the loss, resolved.
    limit: bytes that there are, for a rollout_batch that is sized to memory. layers: of both models, in place of what
    their configurations say.

    Raises InputError for settings that contradict each other, as a run would, and for models whose shapes depend on
    their numbers (experts).
    """
    try:
        if layers is not None:
            student = with_layers(student, layers)
            teacher = None if teacher is None else with_layers(teacher, layers)
        return _rehearsed(config, job, student, teacher, device, dtype, backend, limit)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        kind = getattr(student, "model_type", type(student).__name__)
        raise InputError(
            f"plan: a model of type {kind!r} cannot be planned: what it holds depends on its numbers ({error})"
        ) from error


def _rehearsed(
    config: OPCDConfig,
    job: Job,
    student: Any,
    teacher: Any,
    device: str,
    dtype: torch.dtype,
    backend: str,
    limit: int | None,
) -> Rehearsal:
    with stage(device, backend) as meter:
        made = [None if c is None else _model(c, dtype) for c in (student, teacher)]
        with meter.phase("start", "weights"):
            contexts = [[0] * tokens for tokens in job.contexts]
            pair = student_and_teacher(made[0], made[1], _on_cpu(config), CPU, dtype, bool(job.held_out), contexts)
        del made
        if config.teacher_offload:
            refuse_useless_offload(pair.teacher is pair.student, torch.device(device))
        _label_weights(meter, pair)
        run = Step(config, job, pair, meter, device, dtype, limit)
        run.everything()
        result = Rehearsal(meter.peaks, run.path, run.rollout_batch, run.tokens, run.longest, run.notes)
        for phase in ("start", "other"):  # moments that no run has
            result.peaks.pop(phase, None)
    return result


def with_layers(source: Any, layers: int) -> Any:
    """A copy of a transformers configuration with so many layers, the first ones."""
    copied = copy.deepcopy(source)
    text = copied.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = list(text.layer_types)[:layers]
    return copied


def _model(source: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(copy.deepcopy(source), dtype=dtype).eval()


def _on_cpu(config: OPCDConfig) -> OPCDConfig:
    """Fake tensors are on a fake CPU, whatever the run's device is."""
    return replace(config, device="cpu", teacher_device="auto", teacher_offload=False)


def _label_weights(meter: Meter, pair: ModelPair) -> None:
    for parameter in pair.student.parameters():
        meter.see(parameter, "adapter" if is_peft(pair.student) and parameter.requires_grad else "weights")
    known = {id(p) for p in pair.student.parameters()}
    for model in (pair.teacher, pair.reference):
        for parameter in () if model is None else model.parameters():
            if id(parameter) not in known:
                meter.see(parameter, "teacher weights")
    for average in (pair.moving.state() if pair.moving else {}).values():
        meter.see(average, "teacher average")

"""One training step on tensors without data: what it holds at its worst moment, phase by phase."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from opcd_fast.attention import flash_shapes
from opcd_fast.errors import InputError
from opcd_fast.models import seam
from opcd_fast.planning.rehearsal.four_bit import packed
from opcd_fast.planning.rehearsal.job import Job
from opcd_fast.planning.rehearsal.meter import Meter, Peak
from opcd_fast.planning.rehearsal.step import Step
from opcd_fast.training.engines import ModelPair, is_peft, refuse_useless_offload, student_and_teacher
from opcd_fast.training.settings import OPCDConfig


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
    config: OPCDConfig, job: Job, student: Any, teacher: Any = None, *,
    device: str, dtype: torch.dtype, backend: str, limit: int | None = None, layers: int | None = None,
) -> Rehearsal:  # fmt: skip
    """A step of a run with these settings, as `OPCDTrainer` makes it from its second step on.

    student, teacher: transformers configurations; left as they are. device: "cuda" or "cpu", where the run will be; it
    need not be here. dtype: the compute type. backend: of the loss, resolved. limit: bytes that there are, for a
    rollout_batch that is sized to memory and a copy of the weights. layers: of both models, in place of what their
    configurations say.

    Raises InputError for settings that contradict each other, as a run would, and for models whose shapes depend on
    their numbers (experts).
    """
    try:
        with _stage(device) as meter:
            with meter.phase("start", "weights"):
                pair = _models(config, job, _with_layers(student, layers), _with_layers(teacher, layers), dtype)
            if config.teacher_offload:
                refuse_useless_offload(pair.teacher is pair.student, torch.device(device))
            _label_weights(meter, pair)
            step = Step(config, job, pair, meter, device=device, dtype=dtype, backend=backend, limit=limit)
            step.run()
            peaks = {name: peak for name, peak in meter.peaks.items() if name not in ("start", "other")}
            return Rehearsal(peaks, step.path, step.rollout_batch, step.tokens, step.longest, _notes(step))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        kind = getattr(student, "model_type", type(student).__name__)
        raise InputError(
            f"plan: a model of type {kind!r} cannot be planned: what it holds depends on its numbers ({error})"
        ) from error


class _OneMode(FakeTensorMode):
    """Copies of fake tensors are of the same mode; each copied model would have one of its own otherwise."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _OneMode:
        return self


@contextmanager
def _stage(device: str) -> Iterator[Meter]:
    """Where tensors have no data, and every storage is counted."""

    def take_over(tensor: torch.Tensor, other: torch.Tensor) -> None:
        tensor.data = other.data

    logger, meter = logging.getLogger("opcd_fast"), Meter()
    saved = logger.level, torch.utils.swap_tensors
    try:
        logger.setLevel(logging.ERROR)  # what a run would say, it says itself
        # `module.to()` gives fake parameters new data, as it does with real ones; else it would swap the tensors, which
        # their weak references forbid.
        torch.utils.swap_tensors = take_over
        shapes = flash_shapes() if device == "cuda" else nullcontext()
        with warnings.catch_warnings(), shapes, _OneMode(allow_non_fake_inputs=True), meter:
            warnings.simplefilter("ignore")
            yield meter
    finally:
        logger.setLevel(saved[0])
        torch.utils.swap_tensors = saved[1]


def _models(config: OPCDConfig, job: Job, student: Any, teacher: Any, dtype: torch.dtype) -> ModelPair:
    from transformers import AutoModelForCausalLM

    # Fake tensors are on a fake CPU, whatever the run's device is.
    changes: dict[str, Any] = {"device": "cpu", "teacher_device": "auto", "teacher_offload": False}
    made: list[Any] = [None, None]
    for i, (source, name) in enumerate(((student, "quantization"), (teacher, "teacher_quantization"))):
        if source is not None:
            how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
            made[i] = AutoModelForCausalLM.from_config(copy.deepcopy(source), **how).eval()
            if getattr(config, name) == "4bit":
                made[i], changes[name] = packed(made[i], dtype), "none"
    contexts = [[0] * tokens for tokens in job.contexts]
    placed = replace(config, **changes)
    return student_and_teacher(made[0], made[1], placed, torch.device("cpu"), dtype, bool(job.held_out), contexts)


def _with_layers(source: Any, layers: int | None) -> Any:
    """A copy of a transformers configuration with so many layers, the first ones."""
    if source is None or layers is None:
        return source
    copied = copy.deepcopy(source)
    text = copied.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = list(text.layer_types)[:layers]
    return copied


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


def _notes(step: Step) -> tuple[str, ...]:
    config, job, on_gpu = step.config, step.job, step.device == "cuda"
    window = seam.setting(seam.config_of(seam.body_of(step.pair.student)), "sliding_window") or 0
    longest = max(student for student, _, _ in job.prompts)
    notes = {
        f"an estimate: the teacher reads its context by path {step.path!r}": step.path != "merge",
        "an estimate: windowed layers are counted as on a CPU": on_gpu and window > 0,
        f"an estimate: the teacher on {config.teacher_device!r} is counted as if it were here":
            config.teacher_device != "auto",
        "not counted: what rollout='vllm' takes for itself (rollout_gpu_share)": config.rollout == "vllm",
        "an estimate: objective='nll' is counted as the divergence, teacher included": config.objective == "nll",
        "not counted: the paged part of the optimizer's state, which leaves the GPU when it is full":
            config.optimizer.startswith("paged_"),
        f"an estimate: every episode takes all of its {job.turns} turns, each as long as the longest of those "
        f"played with random answers ({longest} tokens)": job.turns > 1,
        "an estimate: the student's attention after its trained prefix is counted as on a CPU":
            on_gpu and config.num_virtual_tokens > 0,
    }  # fmt: skip
    return tuple(note for note, holds in notes.items() if holds)

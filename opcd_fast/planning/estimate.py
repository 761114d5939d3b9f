"""What a run that is about to start will need, in a line and within seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from opcd_fast.loss import resolve_backend
from opcd_fast.models import seam
from opcd_fast.planning.rehearsal import Rehearsal, job_of, rehearse
from opcd_fast.planning.search import depth_to_extrapolate, extrapolated
from opcd_fast.teacher import default_batch_bytes


def foreseen(trainer: Any, teacher: Any = None) -> Rehearsal | None:
    """Peak memory of a step of an `OPCDTrainer` in one process, by shallow rehearsals where the model is deep.

    teacher: the transformers configuration of another model that teaches. None for what cannot be rehearsed, and for
    tasks, which would be played. The run's random numbers are left as they are.
    """
    config, own, asked = trainer.config, seam.config_of(trainer.model), trainer.parts.questions.asked
    if asked.task is not None:
        return None
    job, device, dtype = job_of(asked, config), trainer.device.type, trainer.parts.compute_dtype
    config = replace(config, merge_for_rollout=getattr(trainer.rollout, "copies", None))  # as was decided
    if config.teacher_batch_bytes is None:  # of all layers, also in a rehearsal of a few
        config = replace(config, teacher_batch_bytes=default_batch_bytes(seam.body_of(trainer.teachers.pair.teacher)))
    backend = resolve_backend(config.loss_backend, trainer.device, dtype)

    def whole(layers: int | None = None) -> Rehearsal:
        return rehearse(config, job, own, teacher, device=device, dtype=dtype, backend=backend, layers=layers)

    try:
        with torch.random.fork_rng(devices=[]):
            layers = depth_to_extrapolate(own, teacher)
            return whole() if layers is None else extrapolated(whole, layers)
    except Exception:  # noqa: BLE001 - a line of information must not cost a run
        return None

"""What a run that is about to start will need, in a line and within seconds."""

from __future__ import annotations

from typing import Any

import torch

from opcd_fast.loss import resolve_backend
from opcd_fast.models import pick_dtype, seam
from opcd_fast.planning.rehearsal import Rehearsal, job_of, rehearse
from opcd_fast.planning.search import can_extrapolate, extrapolated


def foreseen(trainer: Any, teacher: Any = None) -> Rehearsal | None:
    """Peak memory of a step of an `OPCDTrainer` in one process, by shallow rehearsals where the model is deep.

    teacher: the transformers configuration of another model that teaches. None for what cannot be rehearsed, and for
    tasks, which would be played. The run's random numbers are left as they are.
    """
    config, own, asked = trainer.config, seam.config_of(trainer.model), trainer.parts.questions.asked
    if asked.task is not None:
        return None
    device, dtype = trainer.device.type, pick_dtype(config.dtype, trainer.device)
    backend = resolve_backend(config.loss_backend, trainer.device, dtype)

    def whole(layers: int | None = None) -> Rehearsal:
        return rehearse(config, job_of(asked, config), own, teacher, device=device, dtype=dtype, backend=backend,
                        layers=layers)  # fmt: skip

    try:
        with torch.random.fork_rng(devices=[]):
            if can_extrapolate(own, teacher):
                return extrapolated(whole, own.get_text_config().num_hidden_layers)
            return whole()
    except Exception:  # noqa: BLE001 - a line of information must not cost a run
        return None

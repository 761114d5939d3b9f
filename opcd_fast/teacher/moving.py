"""A teacher whose weights follow the student's: an average over past steps, or a copy made now and then.

    average <- decay * average + (1 - decay) * student          every `every` optimizer steps

decay = 0 is a plain copy. The live teacher, which is the student itself, needs none of this.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def copy_of_trained(model: nn.Module) -> Any:
    """A second model with its own copy of the parameters that are trained; all others are the same tensors.

    For LoRA that is one more adapter, not one more base model. Modules are new, so flags set on one model (training,
    checkpointing, disabled adapters) leave the other alone.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared)


class MovingWeights:
    """Moves the parameters of `teacher` after those of a student.

    trained: the student's parameters by name; `teacher` has parameters of the same names and shapes.
    decay: share of the old average kept by an update, from 0 (a copy) to 1 (never moves). every: optimizer steps from
    one update to the next, counted from the start of the run.

    The average is kept in fp32: at decay 0.99 a bf16 average would round most updates away. A teacher that computes in
    another type gets a rounded copy of it. Updates are made in place, so a `ContextTeacher` sees that its contexts
    must be read again.
    """

    def __init__(self, trained: Mapping[str, Tensor], teacher: nn.Module, decay: float, every: int) -> None:
        self._trained = dict(trained)
        self._decay, self._every = decay, every
        own = dict(teacher.named_parameters())
        self._teacher = {name: own[name] for name in self._trained}
        # A copy needs no more digits than the teacher has.
        plain = {name for name, p in self._teacher.items() if decay == 0 or p.dtype == torch.float32}
        self._average = {
            name: p.detach() if name in plain else self._trained[name].detach().to(p.device, torch.float32, copy=True)
            for name, p in self._teacher.items()
        }

    @torch.no_grad()
    def follow(self, step: int) -> bool:
        """Update after optimizer step number `step`, the first being 1. Returns whether the teacher moved."""
        if step % self._every:
            return False
        for name, average in self._average.items():
            student = self._trained[name].detach().to(average.device)
            if self._decay == 0:
                average.copy_(student)
            else:
                average.lerp_(student.to(average.dtype), 1 - self._decay)
            self._show(name)
        return True

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name: all that a checkpoint must hold."""
        return dict(self._average)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises KeyError for a parameter that is missing."""
        for name, average in self._average.items():
            average.copy_(state[name])
            self._show(name)

    def _show(self, name: str) -> None:
        """Let the teacher have the average, where that is another tensor."""
        teacher = self._teacher[name]
        if teacher.data_ptr() != self._average[name].data_ptr():
            teacher.copy_(self._average[name])

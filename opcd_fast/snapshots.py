"""The state of a run, to and from its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opcd_fast import checkpoint
from opcd_fast.errors import InputError
from opcd_fast.run_folder import RunFolder
from opcd_fast.teachers import Teachers


class Snapshots:
    """Everything that a later step depends on: trained weights, optimizer, a moving teacher, and the records.

    parameters: those trained, by name. identity: see `opcd_fast.run_identity`. keep: newest checkpoints that stay.
    """

    def __init__(
        self,
        folder: RunFolder,
        parameters: Mapping[str, Tensor],
        optimizer: Any,
        teachers: Teachers,
        identity: Callable[[], dict[str, Any]],
        keep: int,
    ) -> None:
        self._folder, self._parameters, self._optimizer = folder, dict(parameters), optimizer
        self._teachers, self._identity, self._keep = teachers, identity, keep

    def save(self, step: int) -> None:
        saved = checkpoint.Saved(self._parameters, self._optimizer.state_dict(), self._teachers.state())
        self._folder.save(step, saved, self._identity(), self._keep)

    def restore(self, steps: int) -> tuple[int, list[dict[str, Any]]]:
        """Put the newest checkpoint's state in place; its step and the records up to it.

        Raises InputError: damaged, of another run, or of more than `steps` steps.
        """
        step, saved, records = self._folder.restore(self._identity())
        if step > steps:
            raise InputError(f"resume: the run has made {step} steps already, steps={steps}; give more")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(saved.weights[name])
        self._optimizer.load_state_dict(saved.optimizer)
        self._teachers.restore(saved.teacher)
        return step, records

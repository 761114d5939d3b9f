"""The state of a run, to and from its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.runtime import checkpoints as checkpoint
from opcd_fast.training.engines import Engine
from opcd_fast.training.run.folder import RunFolder
from opcd_fast.training.step import Teachers


class Snapshots:
    """Everything that a later step depends on: trained weights, optimizer, a moving teacher, and the records.

    engine: the student's parameters and optimizer; what is saved is whole, whatever it is sharded over, and saving
    and restoring are collective. identity: see `opcd_fast.training.run.resumption`. keep: newest checkpoints that stay.
    """

    def __init__(
        self,
        folder: RunFolder,
        engine: Engine,
        teachers: Teachers,
        identity: Callable[[], dict[str, Any]],
        keep: int,
    ) -> None:
        self._folder, self._engine, self._teachers = folder, engine, teachers
        self._identity, self._keep = identity, keep

    def save(self, step: int) -> None:
        weights, optimizer = self._engine.state()
        saved = checkpoint.Saved(weights, optimizer, self._engine.gathered(self._teachers.state()))
        self._folder.save(step, saved, self._identity(), self._keep)

    def restore(self, steps: int) -> tuple[int, list[dict[str, Any]]]:
        """Put the newest checkpoint's state in place; its step and the records up to it.

        Raises InputError: damaged, of another run, or of more than `steps` steps.
        """
        step, saved, records = self._folder.restore(self._identity())
        if step > steps:
            raise InputError(f"resume: the run has made {step} steps already, steps={steps}; give more")
        self._engine.restore(saved.weights, saved.optimizer)
        self._teachers.restore(saved.teacher)
        return step, records

"""Whom the student learns from, and whom it is measured against: the models of a run as readers of its contexts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from opcd_fast.errors import InputError
from opcd_fast.models import same_device
from opcd_fast.teacher import ContextTeacher, Offload, OffloadedTeacher, RemoteTeacher
from opcd_fast.training.engines import ModelPair
from opcd_fast.training.settings import OPCDConfig

Reader = ContextTeacher | RemoteTeacher


class Teachers:
    """The teacher of a run, and its reference.

    `teacher` scores the answers in training. `reference` is the teacher as it was before training: evaluations use it
    in every mode, because a distance to a teacher that moves with the student says nothing about the context. It is
    None when the run kept no first weights. In mode "frozen" both are one object.

    Raises InputError: contexts that the model cannot read.
    """

    def __init__(
        self,
        pair: ModelPair,
        prefixes: Sequence[Sequence[int]],
        config: OPCDConfig,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.pair = pair
        self._offload: Offload | None = None  # with it there is one teacher, and it is frozen

        def reader(model: Any, adapter: str, masters: bool = False, contexts: Any = prefixes) -> Reader:
            if config.teacher_offload and self._offload is None:
                self._offload = Offload(model, device)
            try:
                with self.at_work():
                    made = ContextTeacher(
                        model,
                        [torch.tensor(context, dtype=torch.int64) for context in contexts],
                        path=config.teacher_path,
                        adapter=adapter,
                        max_prefix_bytes=config.max_prefix_bytes,
                        max_batch_bytes=config.teacher_batch_bytes,
                        prefix_device=config.prefix_device,
                        frozen_weights=True,  # `after_step` and `restore` tell it when they moved
                        autocast=autocast if masters else nullcontext,
                    )
                    _ = made.path  # a path that fails its check is an error now, not in the first step
            except ValueError as error:
                raise InputError(str(error)) from error
            if self._offload is not None:
                return OffloadedTeacher(made, self._offload)
            return made if same_device(next(model.parameters()).device, device) else RemoteTeacher(made, device)

        self._reader = reader
        self._moves = config.teacher_mode != "frozen"
        self.reference: Reader | None = None
        if not self._moves or pair.reference is not None:
            self.reference = reader(pair.reference, pair.reference_adapter)
        if not self._moves:
            assert self.reference is not None
            self.teacher = self.reference
        else:
            # Trained weights are fp32 masters, here as in the student; a rounded copy of them runs as it is.
            masters = any(p.dtype == torch.float32 for p in pair.teacher.parameters())
            self.teacher = reader(pair.teacher, pair.teacher_adapter, masters)

    def at_work(self) -> AbstractContextManager[None]:
        """The models are on their devices while the block is open, also one that is offloaded between its calls."""
        return nullcontext() if self._offload is None else self._offload.on_device()

    def after_step(self, step: int) -> None:
        """Let the teacher follow optimizer step number `step`, the first being 1.

        A run knows when its weights move, so what was read of the contexts is dropped here and no teacher of a run
        looks at its weights.
        """
        moved = self._moves if self.pair.moving is None else self.pair.moving.follow(step)
        if moved:
            self.teacher.invalidate()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the student; empty unless there is an average or a copy."""
        return {} if self.pair.moving is None else self.pair.moving.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's `state`, the student's weights being restored already."""
        if self.pair.moving is not None:
            self.pair.moving.restore(state)
        if self._moves:
            self.teacher.invalidate()

    def reference_on(self, contexts: Sequence[Sequence[int]]) -> Reader:
        """The reference as a reader of other contexts, with settings as its own."""
        assert self.reference is not None
        return self._reader(self.pair.reference, self.pair.reference_adapter, contexts=contexts)

    def first_weights(self) -> tuple[ContextTeacher, str]:
        """Before training: some reader of the contexts with the first weights, where its model is, and its adapter."""
        reader, adapter = self.teacher, self.pair.teacher_adapter
        if self.reference is not None:
            reader, adapter = self.reference, self.pair.reference_adapter
        return (reader.local if isinstance(reader, RemoteTeacher) else reader), adapter

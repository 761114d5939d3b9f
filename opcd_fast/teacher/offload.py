"""A frozen teacher in the host's memory, on the device only while it scores.

All of its weights go up before a call and are dropped after it, so that they never lie beside the student's
activations. Nothing comes back down: the host's copy stays. The lm-head, which the loss reads, and buffers stay on the
device; so do the contexts' keys and values, unless `prefix_device` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opcd_fast.teacher.context_teacher import ContextTeacher
from opcd_fast.teacher.remote import RemoteTeacher


class Offload:
    """Brings the parameters of `model`, which lie on the host and never change, to `device` for a while.

    On a CUDA device the host's copies are pinned, so that they move at full speed. Raises ValueError for parameters
    that are trained.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device, self._depth = device, 0
        if any(p.requires_grad for p in model.parameters()):
            raise ValueError("model: parameters that are trained cannot be offloaded")
        self._homes: list[tuple[nn.Parameter, Tensor]] = []
        for p in model.parameters():  # each once, also where it is tied
            home = p.data.pin_memory() if device.type == "cuda" else p.data
            p.data = home
            self._homes.append((p, home))
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The model is on the device while the block is open; blocks may be nested."""
        self._depth += 1
        try:
            if self._depth == 1:
                for p, home in self._homes:
                    p.data = home.to(self.device, non_blocking=True, copy=True)
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for p, home in self._homes:
                    p.data = home


class OffloadedTeacher(RemoteTeacher):
    """`teacher`, whose model `offload` moves, for a student on the same device."""

    def __init__(self, teacher: ContextTeacher, offload: Offload) -> None:
        super().__init__(teacher, offload.device)
        self._offload = offload
        with offload.on_device():
            _ = self.local.head, self.head  # looks at the model, and copies its weight

    def hidden_states_packed(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._offload.on_device():
            return super().hidden_states_packed(*args, **kwargs)

    @property
    def prefixes(self) -> Any:
        with self._offload.on_device():
            return self.local.prefixes

    def explain(self) -> str:
        with self._offload.on_device():
            return self.local.explain()

    @property
    def path(self) -> str:
        with self._offload.on_device():
            return self.local.path

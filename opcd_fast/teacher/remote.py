"""A teacher whose body runs on another device than the student; only what the loss reads comes over.

Per call that is the hidden states at response positions, (N, D_t), and the token ids on their way there. The lm-head is
copied once, and again when its weight changes. Keys, values, activations and logits stay where they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opcd_fast.loss import LMHead
from opcd_fast.models import Checksum, checksum
from opcd_fast.teacher.context_teacher import ContextTeacher


class RemoteTeacher:
    """`teacher`, which lives on a device of its own, as seen from `device`.

    `hidden_states_packed` and `head` answer on `device`; everything else is the teacher's.
    """

    def __init__(self, teacher: ContextTeacher, device: torch.device) -> None:
        self.local = teacher
        self.device = device
        self._copied_from: Checksum | None = None
        self._head: LMHead | None = None

    def hidden_states_packed(
        self, input_ids: Tensor, cu_seqlens: Tensor, *, context_index: Any = None, select: Tensor | None = None
    ) -> Tensor:
        """See `ContextTeacher.hidden_states_packed`; (N, D_t) on `device`."""
        with torch.cuda.device_of(self.local.head.weight):  # Triton launches on the current GPU
            hidden = self.local.hidden_states_packed(input_ids, cu_seqlens, context_index=context_index, select=select)
        return hidden.to(self.device)

    @property
    def head(self) -> LMHead:
        """The teacher's lm-head on `device`: the same copy until its values, or those of its bias, are others."""
        head = self.local.head
        parts = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
        now = None if self.local.frozen_weights else checksum(parts.items())
        if self._head is None or now != self._copied_from:
            self._head = None  # before the new copy is made, so that there are never two
            copies: dict[str, Any] = {name: x.detach().to(self.device) for name, x in parts.items()}
            self._head, self._copied_from = replace(head, **copies), now
        return self._head

    def invalidate(self) -> None:
        """See `ContextTeacher.invalidate`; the head is copied anew as well."""
        self._head = None
        self.local.invalidate()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.local, name)

"""Weights, gradients and optimizer sharded by torch's FSDP2.

Ranks meet in every layer. A decoder layer is gathered when that layer runs, and what lies outside of the layers
(embeddings, last norm, lm-head) when the forward of `WorkInside` begins: the head is gathered once per micro-batch, not
for every chunk of the loss, and its gradient takes the engine's own way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from opcd_fast.engine import ShardingEngine, WorkInside
from opcd_fast.model_pair import ModelPair


class FSDP2Engine(ShardingEngine):
    """Parameters become DTensors, other objects than before."""

    def _prepare(self, pair: ModelPair, optimizer: Any) -> None:
        from torch.distributed.fsdp import FSDPModule

        self._module, self.optimizer = self.accelerator.prepare(WorkInside(pair), optimizer)
        parts = [m for m in self._module.modules() if isinstance(m, FSDPModule)]
        self._reshard = [(part, part is not self._module) for part in parts]

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        self._module(lambda: None)  # the first forward decides which module is the root
        try:
            for module, _ in self._reshard:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            yield
        finally:
            for module, reshard in self._reshard:
                module.reshard()
                module.set_reshard_after_forward(reshard, recurse=False)

    def backward(self, loss: Tensor) -> None:
        """Sends the gradients each time, because whole ones would need the memory that sharding is there to save; and
        takes their mean over the ranks, where the sum is wanted."""
        self.accelerator.backward(loss * self.ranks.world)

    def _full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def _mine(self, like: Tensor, full: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        full = full.to(like.device)
        if not hasattr(like, "full_tensor"):
            return full
        assert isinstance(like, DTensor)
        return distribute_tensor(full.to(like.dtype), like.device_mesh, like.placements)

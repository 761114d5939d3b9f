"""Weights, gradients and optimizer sharded by torch's FSDP2.

Ranks meet in every layer. A decoder layer is gathered when that layer runs, and what lies outside of the layers
(embeddings, last norm, lm-head) when the forward of `WorkInside` begins: the head is gathered once per micro-batch, not
for every chunk of the loss, and its gradient takes the engine's own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from opcd_fast.models import seam
from opcd_fast.training.engines.engine import Engine
from opcd_fast.training.engines.model_pair import ModelPair

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class FSDP2Engine(Engine):
    """The models keep their identity; their parameters become DTensors, other objects than before. All methods are
    collective."""

    sharded = True
    _is_whole = False

    def _prepare(self, pair: ModelPair, optimizer: Any) -> None:
        from torch.distributed.fsdp import FSDPModule

        self._module, self.optimizer = self.accelerator.prepare(WorkInside(pair), optimizer)
        parts = [m for m in self._module.modules() if isinstance(m, FSDPModule)]
        self._reshard = [(part, part is not self._module) for part in parts]

    def inside(self, work: F) -> F:
        def called(*args: Any, **options: Any) -> Any:
            return work(*args, **options) if self._is_whole else self._module(partial(work, *args, **options))[0]

        return called  # type: ignore[return-value]

    @contextmanager
    def whole(self) -> Iterator[None]:
        if self._is_whole:
            yield
            return
        self._module(lambda: None)  # the first forward decides which module is the root
        try:
            for module, _ in self._reshard:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            self._is_whole = True
            yield
        finally:
            self._is_whole = False
            for module, reshard in self._reshard:
                module.reshard()
                module.set_reshard_after_forward(reshard, recurse=False)

    def backward(self, loss: Tensor) -> None:
        """Sends the gradients each time, because whole ones would need the memory that sharding is there to save; and
        takes their mean over the ranks, where the sum is wanted."""
        self.accelerator.backward(loss * self.ranks.world)

    def _sum_gradients(self) -> None:
        """They are sums after each micro-batch already."""

    def _full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def _mine(self, like: Tensor, full: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        full = full.to(like.device)
        if not hasattr(like, "full_tensor"):
            return full
        assert isinstance(like, DTensor)
        return distribute_tensor(full.to(like.dtype), like.device_mesh, like.placements)


class WorkInside(nn.Module):
    """The models of a run as one module, whose forward is the work it is given: there the weights are gathered."""

    def __init__(self, pair: ModelPair) -> None:
        super().__init__()
        models = {id(m): m for m in (pair.student, pair.teacher, pair.reference) if m}
        self.models = nn.ModuleList(models.values())
        # What accelerate asks a transformers model for: the layers that are gathered one by one.
        layers = (layer for model in models.values() for layer in seam.layers_of(model))
        self._no_split_modules = sorted({type(layer).__name__ for layer in layers})

    def forward(self, work: Callable[[], T]) -> tuple[T]:
        return (work(),)  # FSDP2 looks for tensors in what a module returns, and knows tuples

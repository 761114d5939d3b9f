"""Where a step is rehearsed: tensors have no data there, and every storage is counted."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opcd_fast.planning.rehearsal.four_bit import packed_by_stand_ins
from opcd_fast.planning.rehearsal.gpu_attention import as_on_cuda
from opcd_fast.planning.rehearsal.loss_scratch import loss_scratch
from opcd_fast.planning.rehearsal.meter import Meter


class _OneMode(FakeTensorMode):
    """Copies of fake tensors are of the same mode; each copied model would have one of its own otherwise."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _OneMode:
        return self


@contextmanager
def stage(device: str, backend: str) -> Iterator[Meter]:
    """Where nothing has data: entered by whoever rehearses."""

    def inside(args: tuple[Any, ...]) -> int:
        return loss_scratch(args, device=device, backend=backend)

    meter = Meter({torch.ops.opcd_fast.linear_divergence.default: inside})
    logger = logging.getLogger("opcd_fast")
    level = logger.level
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logger.setLevel, level)
        logger.setLevel(logging.ERROR)  # what a run would say, it says itself
        stack.enter_context(packed_by_stand_ins())
        stack.enter_context(_moved_in_place())
        if device == "cuda":
            stack.enter_context(as_on_cuda())
        stack.enter_context(_OneMode(allow_non_fake_inputs=True))
        stack.enter_context(meter)
        yield meter


@contextmanager
def _moved_in_place() -> Iterator[None]:
    """`module.to()` gives fake parameters new data, as it does with real ones; else it would swap the tensors, which
    their weak references forbid."""

    def take_over(tensor: torch.Tensor, other: torch.Tensor) -> None:
        tensor.data = other.data

    saved = torch.utils.swap_tensors
    try:
        torch.utils.swap_tensors = take_over
        yield
    finally:
        torch.utils.swap_tensors = saved

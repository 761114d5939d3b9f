"""Which copy of a model answers in its place, and whether it is worth its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from opcd_fast.models.loading import cpu_has_bf16
from opcd_fast.models.merged import MergedCopy
from opcd_fast.models.weights import weights_of

_YET_TO_COME = 8  # copies: gradients and Adam's state of float32 weights take six, and one is the copy itself


class CastCopy:
    """The weights of `model` in `dtype`; tied ones stay tied. They hold numbers after the first `refresh`, and stay
    where they are, so that recorded steps go on reading them.

    Buffers that `dtype` holds without loss are in it, too, as they were when the model was loaded: some layers multiply
    them with its weights. RoPE's frequencies are float32 in a model of any type."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._source = model
        cast = {id(p): nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=False) for p in model.parameters()}
        self.model: Any = copy.deepcopy(model, cast).eval()
        for x in self.model.buffers():
            if x.is_floating_point() and not (x != x.to(dtype)).any():
                x.data = x.data.to(dtype)

    @staticmethod
    def supports(model: Any, dtype: torch.dtype | None) -> bool:
        """True for a model without adapters whose weights are float32, wider than `dtype`."""
        wide = dtype is not None and dtype.itemsize < torch.float32.itemsize and not hasattr(model, "peft_config")
        return wide and all(parameter.dtype == torch.float32 for parameter in model.parameters())

    @torch.no_grad()
    def refresh(self) -> Any:
        """The copy with the weights of this moment. Always copied: to see that nothing moved costs more."""
        for (_, copied), (_, x) in zip(weights_of(self.model), weights_of(self._source), strict=True):
            copied.copy_(x)
        return self.model


def copy_for_answers(
    model: Any, dtype: torch.dtype | None = None, device: str | None = None, *, frozen_base: bool = False
) -> Callable[[], MergedCopy | CastCopy] | None:
    """Makes the copy, with an adapter folded in, else in `dtype`; None where there is neither. See `MergedCopy`."""
    if MergedCopy.supports(model):
        return partial(MergedCopy, model, device, frozen_base=frozen_base)
    return partial(CastCopy, model, dtype) if dtype is not None and CastCopy.supports(model, dtype) else None


def worth_copying(model: Any, dtype: torch.dtype | None, device: str, free: float) -> tuple[bool, str]:
    """Whether that copy should be made, on "cuda" or "cpu" with `free` bytes, and why: by rule and not by the clock, so
    that a run which is repeated rounds as it did."""
    on_cpu = device == "cpu"
    if MergedCopy.supports(model):
        if not on_cpu:
            return False, "on a GPU, where the copy takes memory that training needs; not measured there yet"
        if MergedCopy.bytes_needed(model) > free / 2:
            return False, "the copy would take over half of what is free"
        return True, "on a CPU, where adapters' small products cost more than their share of the arithmetic"
    if dtype is None or not CastCopy.supports(model, dtype):
        return False, "no LoRA adapter to fold in"
    name = str(dtype).removeprefix("torch.")
    if on_cpu and not cpu_has_bf16():
        return False, f"on a CPU that only imitates {name}"
    if _YET_TO_COME * dtype.itemsize * sum(p.numel() for p in model.parameters()) > free:
        return False, f"the copy would take over 1/{_YET_TO_COME} of what is free, where gradients are yet to come"
    return True, f"weights that are trained in float32 are half the bytes in {name}, at every token"

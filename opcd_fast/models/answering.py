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
    """The weights of `model` in `dtype`, tied ones tied, with numbers from the first `refresh` on. They stay where they
    are, so that recorded steps go on reading them. Buffers that `dtype` holds without loss are in it, as they were when
    the model was loaded (some layers multiply them with weights); RoPE's frequencies are float32."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._source = model
        cast = {id(p): nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=False) for p in model.parameters()}
        self.model: Any = copy.deepcopy(model, cast).eval()
        for x in self.model.buffers():
            if x.is_floating_point() and not (x != x.to(dtype)).any():
                x.data = x.data.to(dtype)

    @torch.no_grad()
    def refresh(self) -> Any:
        """The copy with the weights of this moment. Always copied: to see that nothing moved costs more."""
        for (_, copied), (_, x) in zip(weights_of(self.model), weights_of(self._source), strict=True):
            copied.copy_(x)
        return self.model


def copy_for_answers(
    model: Any, dtype: torch.dtype | None, device: str, free: float, *, frozen_base: bool = False
) -> tuple[Callable[[], MergedCopy | CastCopy] | None, bool, str]:
    """What makes a copy of `model` (LoRA folded in, or float32 weights in `dtype`; None: neither), whether that is
    worth while on "cuda" or "cpu" with `free` bytes, and why: by rule and not by the clock, so that a run which is
    repeated rounds as it did. frozen_base: see `MergedCopy`."""
    if MergedCopy.supports(model):
        merged = partial(MergedCopy, model, device, frozen_base=frozen_base)
        if device != "cpu":
            return merged, False, "on a GPU, where the copy takes memory that training needs; not measured there yet"
        if MergedCopy.bytes_needed(model) > free / 2:
            return merged, False, "the copy would take over half of what is free"
        return merged, True, "on a CPU, where adapters' small products cost more than their share of the arithmetic"
    wide = not hasattr(model, "peft_config") and {p.dtype for p in model.parameters()} == {torch.float32}
    if not wide or dtype is None or dtype.itemsize >= torch.float32.itemsize:
        return None, False, "no LoRA adapter to fold in"
    name, cast = str(dtype).removeprefix("torch."), partial(CastCopy, model, dtype)
    if device == "cpu" and not cpu_has_bf16():
        return cast, False, f"on a CPU that only imitates {name}"
    if dtype.itemsize * sum(p.numel() for p in model.parameters()) > free / _YET_TO_COME:
        return cast, False, f"the copy would take over 1/{_YET_TO_COME} of what is free, and gradients are yet to come"
    return cast, True, f"weights that are trained in float32 are half the bytes in {name}, at every token"

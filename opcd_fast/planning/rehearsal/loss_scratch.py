"""What the fused loss holds inside of itself: the buffers of `chunks`, cut as `workspace` cuts them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opcd_fast.kernels.reference import STATISTICS
from opcd_fast.loss.chunks import (
    Side,
    Spec,
    Wanted,
    gradient_dtype,
    has_gradient_buffer,
    make_plan,
    multiprocessors_of,
    pitch_of,
    returned_dtype,
    runs_native,
    scratch_planes,
    upcast_tile,
)


@dataclass(frozen=True)
class Seen:
    """What `workspace` looks at in a tensor, on a device that need not be here."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_cuda: bool
    place: int  # of its memory

    def data_ptr(self) -> int:
        return self.place

    def stride(self) -> tuple[int, ...]:
        return (self.shape[-1], 1)


def loss_scratch(args: tuple[Any, ...], *, device: str, backend: str) -> int:
    """Bytes at the worst moment of one call of `opcd_fast::linear_divergence`, beside what it returns.

    args: the operator's. device: "cuda" or "cpu"; backend: the one that will run there.
    """
    h_s, w_s, _, h_t, w_t, _, token_weights, *_ = args
    dw_into, wanted = args[8], Wanted(*args[9])
    spec = replace(Spec.unpacked(*args[12:]), backend=backend)

    def seen(x: Tensor, columns: int | None = None) -> Any:
        shape = (x.shape[0] if columns is None else columns, *x.shape[1:])
        return Seen(tuple(shape), x.dtype, device == "cuda", x.untyped_storage()._cdata)

    v, n = spec.vocab_size, h_s.shape[0]
    student, teacher = Side(seen(h_s), seen(w_s, v)), Side(seen(h_t), seen(w_t, v))
    dtype = torch.float64 if torch.float64 in (h_s.dtype, w_s.dtype, h_t.dtype, w_t.dtype) else torch.float32
    size, pitch = dtype.itemsize, pitch_of(v)
    planes = sum(scratch_planes(spec))
    # Of the device if it is here, else of an assumed one: a plan does not ask which kind it will be.
    place = torch.device(device if torch.cuda.is_available() else "cpu")
    plan = make_plan(n, [student, teacher], v, spec, wanted, planes, multiprocessors_of(place))
    _, tiles = upcast_tile([student, teacher], dtype, v)
    buffers = 2 * plan.logit_rows * pitch * size + tiles
    if has_gradient_buffer(student, dtype, spec, wanted):
        buffers += plan.gradient_rows * pitch * gradient_dtype(student, dtype).itemsize
    buffers += planes * plan.block_rows * v * size
    taken = min(n, plan.logit_rows)
    rows = min(n, plan.gradient_rows) * h_s.shape[-1]
    copied = not runs_native(student) and h_s.dtype != dtype
    buffers += rows * size * int(copied)
    # In the end either a chunk's teacher rows in the products' type, or its dH in float32 and rounded.
    of_teacher = taken * h_t.shape[-1] * size if not runs_native(teacher) and h_t.dtype != dtype else 0
    of_gradient = rows * (size + (h_s.dtype.itemsize if h_s.dtype != dtype else 0)) if wanted.hidden else 0
    buffers += max(of_teacher, of_gradient)
    if backend == "torch" and pitch != v:
        buffers += plan.block_rows * v * size  # torch's softmax makes rows that are not back to back contiguous
    kept = returned_dtype(w_s.dtype)
    if wanted.weight and dw_into is None and kept != dtype:
        # Added up in float32 beside these buffers; rounded, into what is counted as a result, when they are gone.
        buffers += w_s.numel() * (size - kept.itemsize)
    return buffers + (2 * len(STATISTICS) + 2) * n * size

"""How one call of a fused loss cuts its scratch memory: which buffers, which dtypes, how many rows at a time.

Functions of the shapes, dtypes and `workspace_bytes` alone, never of free memory: the same call always does
the same arithmetic in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opcd_fast.spec import Spec, Wanted

GIB = 1 << 30
DEFAULT_WORKSPACE = GIB  # without dW: large chunks bring nothing
# dW is read and written once per gradient chunk, so those are larger.
DEFAULT_WORKSPACE_WITH_DW = 5 * GIB // 2
GRADIENT_CHUNKS = 4  # gradient chunk / logit chunk, when the two differ
PITCH = 64  # elements; row starts stay 128-byte aligned in 2-byte buffers, whatever V is


class Side(NamedTuple):
    """One model's half of the products: hidden states (n, D) and head weight (V, D)."""

    h: Tensor
    weight: Tensor


class Plan(NamedTuple):
    """How scratch is cut. All in rows, except tile (vocabulary rows of a weight upcast at a time)."""

    logit_rows: int
    gradient_rows: int
    block_rows: int
    tile: int


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def returned_dtype(dtype: torch.dtype) -> torch.dtype:
    """How a gradient is kept until the upstream gradient is known: a loss scaler's 65536 would come too late for
    one that was rounded to fp16."""
    return torch.float32 if dtype == torch.float16 else dtype


def runs_native(h: Tensor, weight: Tensor) -> bool:
    """Whether one GEMM can read both as they are and write float32. Only bf16 on a device: cuBLAS gives bf16
    inputs a float32 output, CPU libraries do not, and an fp16 gradient would underflow."""
    return h.is_cuda and h.dtype == weight.dtype == torch.bfloat16


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape


def pitch_of(columns: int) -> int:
    return -(-columns // PITCH) * PITCH


def block_rows(v: int) -> int:
    """Rows whose elementwise work is done together by plain PyTorch: about 16 MB a buffer.

    Smaller blocks fit more caches, but each operation on a block is a parallel region, and where other
    processes want the same cores every region waits for a descheduled thread.
    """
    return max(4, (1 << 22) // v)


def upcast_tile(sides: list[Side], dtype: torch.dtype, v: int) -> tuple[int, int]:
    """(vocabulary rows of a weight that are upcast at a time, bytes of the buffers for that); v if none is."""
    cast: list[Side] = []
    for side in sides:
        known = any(same_memory(side.weight, other.weight) for other in cast)
        if not runs_native(*side) and side.weight.dtype != dtype and not known:
            cast.append(side)
    if not cast:
        return v, 0
    # 16 MB of float32: few enough parallel regions, and mostly still in cache when the product reads it.
    elements = 1 << (24 if sides[0].h.is_cuda else 22)
    tile = min(v, max(256, elements // max(side.h.shape[-1] for side in sides) // 64 * 64))
    return tile, tile * sum(side.h.shape[-1] for side in cast) * dtype.itemsize


def make_plan(rows: int, sides: list[Side], v: int, spec: Spec, wanted: Wanted, planes: int) -> Plan:
    """Cut `workspace_bytes` into buffers.

    sides: the student first. v: columns of the logits. planes: (block, V) buffers that the row operation needs beside
    the logits.

    Raises ValueError when the workspace does not hold one row.
    """
    dtype = compute_dtype(*(tensor for side in sides for tensor in side))
    size = dtype.itemsize
    pitch = pitch_of(v)
    student = sides[0]
    on_device = student.h.is_cuda
    width_s = student.h.shape[-1]
    others = sum(side.h.shape[-1] for side in sides[1:])

    budget = spec.workspace_bytes
    default = DEFAULT_WORKSPACE_WITH_DW if wanted.weight else DEFAULT_WORKSPACE
    tile, fixed = upcast_tile(sides, dtype, v)
    # Per logit row: a logit buffer a side and the teacher's hidden state. Per gradient row: the student's hidden
    # state, dH before and after its cast, and G where it has a buffer of its own.
    ratio = GRADIENT_CHUNKS if spec.backend == "triton" and wanted.weight else 1
    per_row = (len(sides) * pitch + others + ratio * 3 * width_s) * size
    if has_gradient_buffer(student, dtype, spec, wanted):
        per_row += ratio * pitch * gradient_dtype(student, dtype).itemsize

    block_row = planes * v * size
    smallest = fixed + per_row + block_row
    if budget is None:
        budget = max(smallest, default)
    if budget < smallest:
        raise ValueError(
            f"workspace_bytes is {budget}, too small for one row of {v} logits; "
            f"give at least {smallest} (bytes), or None for the default"
        )
    block = 0
    if block_row:
        spare = 1 + (budget - smallest) // block_row
        block = max(1, min(rows, block_rows(v), budget // 4 // block_row, spare))
    fit = (budget - fixed - block * block_row) // per_row
    chunks = -(-rows // fit)
    logit_rows = -(-rows // chunks)
    if on_device and logit_rows > 128:
        # Whole GEMM tiles: a last tile of a few rows costs as much as a full one.
        logit_rows = min(fit, -(-logit_rows // 128) * 128)
        if logit_rows > 128:
            logit_rows = logit_rows // 128 * 128
    gradient_rows = logit_rows if logit_rows >= rows else ratio * logit_rows
    return Plan(min(logit_rows, rows), min(gradient_rows, rows), block, tile)


def gradient_dtype(student: Side, dtype: torch.dtype) -> torch.dtype:
    """The dtype of G = d(sum)/d(logits): bf16 where the GEMMs that consume it read bf16, else the logits'."""
    return torch.bfloat16 if runs_native(*student) else dtype


def has_gradient_buffer(student: Side, dtype: torch.dtype, spec: Spec, wanted: Wanted) -> bool:
    """Whether G is stored beside the logits instead of over them.

    Over them is safe where G has the logits' dtype: every element is overwritten by what has read it last. A
    2-byte G over 4-byte logits would need a barrier between the reads and the writes of a row.
    """
    if not any(wanted):
        return False
    return gradient_dtype(student, dtype) != dtype or (spec.backend == "triton" and wanted.weight)

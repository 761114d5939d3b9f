"""How one call of a fused loss cuts its scratch memory: which buffers, which dtypes, how many rows at a time.

Functions of the shapes, dtypes and `workspace_bytes` alone, never of free memory: the same call always does
the same arithmetic in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opcd_fast.kernels import reference

GIB = 1 << 30
DEFAULT_WORKSPACE = GIB  # without dW: large chunks bring nothing
# dW is read and written once per gradient chunk, so those are larger.
DEFAULT_WORKSPACE_WITH_DW = 5 * GIB // 2
LOGITS_SCRATCH = GIB // 4  # for logits that exist already
GRADIENT_CHUNKS = 4  # gradient chunk / logit chunk, when the two differ
PITCH = 64  # elements; row starts stay 128-byte aligned in 2-byte buffers, whatever V is


@dataclass(frozen=True)
class Spec:
    """The scalars of one call."""

    scale_s: float
    scale_t: float
    softcap_s: float | None
    softcap_t: float | None
    temperature: float
    vocab_size: int  # valid entries, the same for both sides
    workspace_bytes: int | None
    backend: str  # "torch" or "triton", resolved
    all_statistics: bool


class Wanted(NamedTuple):
    """Which gradients the caller will use."""

    hidden: bool
    weight: bool
    bias: bool


class Plan(NamedTuple):
    """How scratch is cut. All in rows, except tile (vocabulary rows of a weight upcast at a time)."""

    logit_rows: int
    gradient_rows: int
    block_rows: int
    tile: int


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def runs_native(h: Tensor, weight: Tensor) -> bool:
    """Whether one GEMM can read both as they are and write float32. Only bf16 on a device: cuBLAS gives bf16
    inputs a float32 output, CPU libraries do not, and an fp16 gradient would underflow."""
    return h.is_cuda and h.dtype == weight.dtype == torch.bfloat16


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape


def pitch_of(columns: int) -> int:
    return -(-columns // PITCH) * PITCH


def block_rows(v: int) -> int:
    """Rows whose elementwise work is done together in the reference: about 16 MB a buffer.

    Smaller blocks fit more caches, but each operation on a block is a parallel region, and where other
    processes want the same cores every region waits for a descheduled thread.
    """
    return max(4, (1 << 22) // v)


def make_plan(rows: int, h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, spec: Spec, wanted: Wanted) -> Plan:
    """Cut `workspace_bytes` into buffers.

    Raises ValueError when it does not hold one row.
    """
    dtype = compute_dtype(h_s, w_s, h_t, w_t)
    size = dtype.itemsize
    v, pitch = spec.vocab_size, pitch_of(spec.vocab_size)
    on_device = h_s.is_cuda
    native_s, native_t = runs_native(h_s, w_s), runs_native(h_t, w_t)
    cast_s = not native_s and w_s.dtype != dtype
    cast_t = not native_t and w_t.dtype != dtype and not (cast_s and same_memory(w_s, w_t))
    width_s, width_t = h_s.shape[-1], h_t.shape[-1]

    tile = v
    if cast_s or cast_t:
        # 16 MB of float32: few enough parallel regions, and mostly still in cache when the product reads it.
        elements = 1 << (24 if on_device else 22)
        tile = min(v, max(256, elements // max(width_s, width_t) // 64 * 64))
    fixed = tile * (width_s * cast_s + width_t * cast_t) * size

    # Per logit row: two logit buffers and the teacher's hidden state. Per gradient row: the student's hidden
    # state, dH before and after its cast, and G where it has a buffer of its own.
    ratio = GRADIENT_CHUNKS if spec.backend == "triton" and wanted.weight else 1
    per_row = (2 * pitch + width_t + ratio * 3 * width_s) * size
    if has_gradient_buffer(h_s, w_s, dtype, spec, wanted):
        per_row += ratio * pitch * gradient_dtype(h_s, w_s, dtype).itemsize

    block_row = reference.scratch_planes(spec.softcap_s) * v * size if spec.backend == "torch" else 0
    smallest = fixed + per_row + block_row
    budget = spec.workspace_bytes
    if budget is None:
        budget = max(smallest, DEFAULT_WORKSPACE_WITH_DW if wanted.weight else DEFAULT_WORKSPACE)
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


def gradient_dtype(h_s: Tensor, w_s: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of G = d(sum)/d(logits): bf16 where the GEMMs that consume it read bf16, else the logits'."""
    return torch.bfloat16 if runs_native(h_s, w_s) else dtype


def has_gradient_buffer(h_s: Tensor, w_s: Tensor, dtype: torch.dtype, spec: Spec, wanted: Wanted) -> bool:
    """Whether G is stored beside the logits instead of over them.

    Over them is safe in the reference, which reads a block of rows before it writes it, and where G has the
    logits' dtype, because then each lane overwrites what it alone has read. A 2-byte G over 4-byte logits
    would need a barrier in the row kernel's loop.
    """
    if spec.backend != "triton" or not any(wanted):
        return False
    return wanted.weight or gradient_dtype(h_s, w_s, dtype) != dtype

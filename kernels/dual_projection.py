"""Both projections of one tile in registers together: two-byte logits and differences, or statistics alone (Triton).

The twin of `reference_dual.dual_projection`, where the formulas are. One program owns a block of rows and one tile
of columns. With a shared head one K loop feeds two accumulators from the same block of W, so both sides add up in
the same order whatever the GEMM does; with different heads two K loops run one after the other.

Bytes per logit: 2 (student, later G) + 2 (difference) + 4 * planes / 128; for statistics only the last.

Hidden states and weights come through tensor descriptors (TMA) from sm_90 on, through pointers before. Both need
rows that start at multiples of 16 bytes: with others the K loop would copy elements one by one. float32 inputs are
multiplied as float32, not TF32: exact and slow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from opcd_fast.kernels.reference_dual import FLOOR, LARGEST_DIFFERENCE, LARGEST_EXPONENT, TILE, tile_count, tile_planes


class Launch(NamedTuple):
    """Rows of a program, K block (half of it for four-byte inputs), warps, pipeline stages."""

    block_n: int
    block_k: int
    warps: int
    stages: int


# By major compute capability and presence of a softcap, where the epilogue is plain (see `choose_launch`). Chosen
# from registers and shared memory of the compiled code; none was timed on a device yet. On sm_90 (64, 64, 4, 3) also
# fits, with two programs per multiprocessor, so that one's epilogue overlaps the other's K loop: the first
# alternative to time.
LAUNCH = {
    (9, False): Launch(128, 64, 8, 3),
    (9, True): Launch(128, 64, 8, 3),
    (10, False): Launch(128, 64, 8, 3),
}
# Half the accumulators per lane, because the wider epilogues need registers.
NARROW = Launch(64, 64, 8, 3)

_TILE = tl.constexpr(TILE)
_FLOOR = tl.constexpr(FLOOR)
_LARGEST = tl.constexpr(LARGEST_DIFFERENCE)
_EXPONENT = tl.constexpr(LARGEST_EXPONENT)
_NO_COLUMN = tl.constexpr(2147483647)


@triton.jit
def _block(matrix, first, rows, stride, start, D, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """(ROWS, BLOCK_K) of a matrix; 0 beyond column D. Rows that are not there hold anything finite."""
    if DESCRIPTOR:
        return matrix.load([first, start])
    else:  # noqa: RET505 (known at compile time)
        row = tl.minimum(first + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        k = start + tl.arange(0, BLOCK_K)
        return tl.load(matrix + row[:, None] * stride + k[None, :], mask=(k < D)[None, :], other=0.0)


@triton.jit
def _project(
    h, w, row, column, n, V, stride_h, stride_w, D,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([BLOCK_N, _TILE], tl.float32)
    for start in range(0, D, BLOCK_K):
        w_block = _block(w, column, V, stride_w, start, D, _TILE, BLOCK_K, DESCRIPTOR).T
        h_block = _block(h, row, n, stride_h, start, D, BLOCK_N, BLOCK_K, DESCRIPTOR)
        acc = tl.dot(h_block, w_block, acc, input_precision="ieee")
    return acc


@triton.jit
def _project_both(
    h_s, h_t, w, row, column, n, V, stride_h_s, stride_h_t, stride_w, D,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    acc_s = tl.zeros([BLOCK_N, _TILE], tl.float32)
    acc_t = tl.zeros([BLOCK_N, _TILE], tl.float32)
    for start in range(0, D, BLOCK_K):
        w_block = _block(w, column, V, stride_w, start, D, _TILE, BLOCK_K, DESCRIPTOR).T
        h_block = _block(h_s, row, n, stride_h_s, start, D, BLOCK_N, BLOCK_K, DESCRIPTOR)
        acc_s = tl.dot(h_block, w_block, acc_s, input_precision="ieee")
        h_block = _block(h_t, row, n, stride_h_t, start, D, BLOCK_N, BLOCK_K, DESCRIPTOR)
        acc_t = tl.dot(h_block, w_block, acc_t, input_precision="ieee")
    return acc_s, acc_t


@triton.jit
def _logits(acc, bias_ptr, columns, inner, outer, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits / temperature."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns)[None, :]
    acc *= inner
    if SOFTCAP:
        acc = (1.0 - 2.0 / (tl.exp(2.0 * acc) + 1.0)) * outer
    return acc


@triton.jit
def _dual_projection_kernel(
    h_s, w_s, h_t, w_t, bias_s_ptr, bias_t_ptr, s_ptr, delta_ptr, tiles_ptr,
    n, V, pitch, D_s, D_t, stride_h_s, stride_w_s, stride_h_t, stride_w_t, stride_s, stride_delta,
    stride_plane, stride_tile, inner_s, inner_t, outer_s, outer_t,
    SHARED: tl.constexpr, HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr,
    SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, STORE: tl.constexpr, ALL_STATISTICS: tl.constexpr,
    DESCRIPTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a tile of W: it comes from memory once, the hidden states from the L2.
    row_blocks = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0) // row_blocks
    row = (tl.program_id(0) % row_blocks) * BLOCK_N
    column = tile * _TILE
    if SHARED:
        acc_s, acc_t = _project_both(
            h_s, h_t, w_s, row, column, n, V, stride_h_s, stride_h_t, stride_w_s, D_s, BLOCK_N, BLOCK_K, DESCRIPTOR
        )
    else:
        acc_s = _project(h_s, w_s, row, column, n, V, stride_h_s, stride_w_s, D_s, BLOCK_N, BLOCK_K, DESCRIPTOR)
        acc_t = _project(h_t, w_t, row, column, n, V, stride_h_t, stride_w_t, D_t, BLOCK_N, BLOCK_K, DESCRIPTOR)

    rows = row + tl.arange(0, BLOCK_N)
    columns = column + tl.arange(0, _TILE)
    z_s = _logits(acc_s, bias_s_ptr, tl.minimum(columns, V - 1), inner_s, outer_s, HAS_BIAS_S, SOFTCAP_S)
    z_t = _logits(acc_t, bias_t_ptr, tl.minimum(columns, V - 1), inner_t, outer_t, HAS_BIAS_T, SOFTCAP_T)

    tiles_ptr += tile.to(tl.int64) * stride_tile + rows
    row_inside = rows < n
    inside = (columns < V)[None, :]
    if ALL_STATISTICS:
        z_t = tl.where(inside, z_t, float("-inf"))
        m = tl.max(z_t, 1)
        m = tl.where(m == float("-inf"), 0.0, m)
        top = tl.min(tl.where(z_t >= m[:, None], columns[None, :], _NO_COLUMN), 1)
        tl.store(tiles_ptr + 5 * stride_plane, m, mask=row_inside)
        tl.store(tiles_ptr + 6 * stride_plane, tl.sum(tl.exp(z_t - m[:, None]), 1), mask=row_inside)
        tl.store(tiles_ptr + 8 * stride_plane, top.to(tl.float32), mask=row_inside)

    z_s = tl.where(inside, z_s, float("-inf"))
    m = tl.max(z_s, 1)
    m = tl.where(m == float("-inf"), 0.0, m)
    z_s -= m[:, None]
    e = tl.exp(z_s)
    z_s = tl.maximum(z_s, -_FLOOR)
    delta = z_s + (m[:, None] - z_t)
    total = tl.sum(e, 1)
    mean = tl.sum(tl.where(e > 0.0, e * delta, 0.0), 1)
    mean = tl.where(total == 0.0, 0.0, mean / total)
    tl.store(tiles_ptr, m, mask=row_inside)
    tl.store(tiles_ptr + stride_plane, total, mask=row_inside)
    tl.store(tiles_ptr + 2 * stride_plane, mean, mask=row_inside)

    mean = tl.where(mean == float("inf"), 0.0, mean)
    delta = tl.minimum(tl.maximum(delta - mean[:, None], -_LARGEST), _LARGEST)
    delta = tl.where(inside, delta, 0.0)
    if STORE:
        mask = row_inside[:, None] & (columns < pitch)[None, :]
        # Padding up to the pitch has probability 0 from here on.
        offsets = rows.to(tl.int64)[:, None] * stride_s + columns[None, :]
        tl.store(s_ptr + offsets, tl.where(inside, z_s, float("-inf")).to(tl.float16), mask=mask)
        offsets = rows.to(tl.int64)[:, None] * stride_delta + columns[None, :]
        tl.store(delta_ptr + offsets, delta.to(tl.float16), mask=mask)
    else:
        # exp again, of something else than above: to keep e alive would not fit the registers
        e = tl.exp(z_s)
        q = tl.exp(tl.minimum(z_s - delta, _EXPONENT))
        series = (
            delta * delta * (0.5 + delta * (-1.0 / 6 + delta * (1.0 / 24 + delta * (-1.0 / 120 + delta * (1.0 / 720)))))
        )
        phi = tl.where(tl.abs(delta) < 0.25, e * series, q - e + e * delta)
        tl.store(tiles_ptr + 3 * stride_plane, tl.sum(phi, 1), mask=row_inside)
    if ALL_STATISTICS:
        top = tl.min(tl.where(z_s >= 0.0, columns[None, :], _NO_COLUMN), 1)
        tl.store(tiles_ptr + 4 * stride_plane, tl.sum(tl.exp(z_s) * z_s, 1), mask=row_inside)
        tl.store(tiles_ptr + 7 * stride_plane, top.to(tl.float32), mask=row_inside)


def choose_launch(major: int, softcap: bool, plain: bool, itemsize: int) -> Launch:
    """plain: no bias, not all statistics, and no softcap together with the KL of a loss alone. itemsize: bytes of
    the wider of the two sides' inputs."""
    launch = LAUNCH.get((major, softcap), NARROW) if plain and itemsize == 2 else NARROW
    return launch._replace(block_k=launch.block_k * 2 // itemsize)


def _major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def dual_projection(
    h_s: Tensor,  # (n, D_s) bf16, fp16 or fp32, unit column stride
    w_s: Tensor,  # (V, D_s) the same dtype
    h_t: Tensor,  # (n, D_t)
    w_t: Tensor,  # (V, D_t); w_s itself for a shared head
    bias_s: Tensor | None,  # (V,) float32
    bias_t: Tensor | None,
    out_s: Tensor | None,  # (n, pitch) float16, pitch >= V a multiple of 16; None: statistics only
    out_difference: Tensor | None,  # (n, pitch) float16
    tiles: Tensor,  # (tile_planes(...), tile_count(V), n) float32, unit stride over rows
    *,
    scale_s: float,
    scale_t: float,
    softcap_s: float | None,
    softcap_t: float | None,
    temperature: float,
    all_statistics: bool,
) -> None:
    """Launch one program per block of rows and tile. Arguments as in `reference_dual.dual_projection`.

    Raises ValueError for other dtypes, shapes or layouts, and for V > 2^24 with all statistics.
    """
    store = out_s is not None
    _check(h_s, w_s, h_t, w_t, bias_s, bias_t, out_s, out_difference, tiles, all_statistics)
    (n, d_s), (v, d_t) = h_s.shape, w_t.shape
    if n == 0:
        return
    matrices = (h_s, w_s, h_t, w_t)
    major = _major_capability(h_s.device)
    descriptor = major >= 9
    softcap = softcap_s is not None or softcap_t is not None
    plain = bias_s is None and bias_t is None and not all_statistics and (store or not softcap)
    launch = choose_launch(major, softcap, plain, max(m.itemsize for m in matrices))
    block_k = launch.block_k
    sources = [
        TensorDescriptor.from_tensor(m, [rows, block_k]) if descriptor else m
        for m, rows in zip(matrices, (launch.block_n, TILE) * 2, strict=True)
    ]
    inner_s, outer_s = _inner_and_outer(scale_s, softcap_s, temperature)
    inner_t, outer_t = _inner_and_outer(scale_t, softcap_t, temperature)
    shared = w_s.data_ptr() == w_t.data_ptr() and w_s.stride() == w_t.stride() and w_s.dtype == w_t.dtype and d_s == d_t
    _dual_projection_kernel[(triton.cdiv(n, launch.block_n) * tile_count(v),)](
        *sources, tiles if bias_s is None else bias_s, tiles if bias_t is None else bias_t,
        tiles if out_s is None else out_s, tiles if out_difference is None else out_difference, tiles,
        n, v, 0 if out_s is None else out_s.shape[1], d_s, d_t, *(m.stride(0) for m in matrices),
        0 if out_s is None else out_s.stride(0), 0 if out_difference is None else out_difference.stride(0),
        tiles.stride(0), tiles.stride(1), inner_s, inner_t, outer_s, outer_t,
        SHARED=shared, HAS_BIAS_S=bias_s is not None, HAS_BIAS_T=bias_t is not None,
        SOFTCAP_S=softcap_s is not None, SOFTCAP_T=softcap_t is not None, STORE=store,
        ALL_STATISTICS=all_statistics, DESCRIPTOR=descriptor, BLOCK_N=launch.block_n, BLOCK_K=block_k,
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _inner_and_outer(scale: float, softcap: float | None, temperature: float) -> tuple[float, float]:
    """logits / temperature = inner * x, or outer * tanh(inner * x) with a softcap."""
    return (scale / temperature, 1.0) if softcap is None else (scale / softcap, softcap / temperature)


def _check(
    h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, bias_s: Tensor | None, bias_t: Tensor | None,
    out_s: Tensor | None, out_difference: Tensor | None, tiles: Tensor, all_statistics: bool,
) -> None:  # fmt: skip
    n, v = h_s.shape[0], w_s.shape[0]
    for name, h, w in (("student", h_s, w_s), ("teacher", h_t, w_t)):
        if h.dtype != w.dtype or h.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{name}: h is {h.dtype}, w is {w.dtype}; expected one of bf16, fp16 and fp32 for both")
        if tuple(h.shape) != (n, w.shape[1]) or w.shape[0] != v or h.stride(1) != 1 or w.stride(1) != 1:
            raise ValueError(
                f"{name}: h has shape {tuple(h.shape)} and strides {h.stride()}, w {tuple(w.shape)} and {w.stride()}; "
                f"expected ({n}, D) and ({v}, D) with unit column stride"
            )
        for matrix, x in (("h", h), ("w", w)):
            if x.data_ptr() % 16 or x.stride(0) * x.itemsize % 16:
                raise ValueError(
                    f"{name}: rows of {matrix} must start at multiples of 16 bytes; they are "
                    f"{x.stride(0) * x.itemsize} bytes apart, the first at {x.data_ptr() % 16} (modulo 16)"
                )
    for name, bias in (("bias_s", bias_s), ("bias_t", bias_t)):
        if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (v,) or bias.stride(0) != 1):
            raise ValueError(f"{name} is {bias.dtype} {tuple(bias.shape)}; expected contiguous float32 ({v},)")
    if (out_s is None) != (out_difference is None):
        raise ValueError("out_s and out_difference must both be given, or both be None")
    for name, out in (("out_s", out_s), ("out_difference", out_difference)):
        if out is None:
            continue
        pitch = out.shape[1]
        if out.dtype != torch.float16 or out.shape[0] != n or pitch < v or pitch % 16 or out.stride(1) != 1:
            raise ValueError(
                f"{name} is {out.dtype} {tuple(out.shape)} with strides {out.stride()}; expected float16 ({n}, pitch) "
                f"with unit column stride and a pitch that is a multiple of 16 and at least {v}"
            )
        if pitch > tile_count(v) * TILE or out_s is None or pitch != out_s.shape[1]:
            raise ValueError(f"{name} has pitch {pitch}; both outputs need the same, at most {tile_count(v) * TILE}")
    expected = (tile_planes(out_s is not None, all_statistics), tile_count(v), n)
    if tiles.dtype != torch.float32 or tuple(tiles.shape) != expected or tiles.stride(2) != 1:
        raise ValueError(f"tiles is {tiles.dtype} {tuple(tiles.shape)}; expected float32 {expected}, rows contiguous")
    if all_statistics and v > 1 << 24:
        raise ValueError(f"V is {v}; top-1 agreement keeps columns in float32, which ends at 2^24")

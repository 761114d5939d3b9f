"""G = p (d - c) and the KL from two-byte logits and differences, one program per row (Triton).

The twin of `reference_dual.dual_gradient`, where the formulas are. Moves 4 bytes in and 2 out per logit, no
reduction before the first store, so a row is read once. Every lane overwrites only what it alone has read:
G may lie over the student's logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opcd_fast.kernels.reference_dual import (
    LARGEST_EXPONENT,
    TILE,
    finish_kl,
    gradient_factor,
    merge_other_statistics,
    merge_tiles,
)

# Tiles a program takes at a time and warps: 8 two-byte values per lane and side are one 128-bit load.
TILES = 16
WARPS = 8

_TILE = tl.constexpr(TILE)
_EXPONENT = tl.constexpr(LARGEST_EXPONENT)


@triton.jit
def _dual_gradient_kernel(
    s_ptr, delta_ptr, scale_ptr, shift_ptr, factor_ptr, logsumexp_ptr, phi_ptr, g_ptr,
    stride_s, stride_delta, stride_g, pitch, n_tiles, inverse_outer,
    SOFTCAP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * stride_s
    delta_ptr += row * stride_delta
    g_ptr += row * stride_g
    scale_ptr += row * n_tiles
    shift_ptr += row * n_tiles
    factor = tl.load(factor_ptr + row)
    logsumexp = tl.load(logsumexp_ptr + row)
    phi = tl.zeros([TILES, _TILE], tl.float32)
    for first in range(0, n_tiles, TILES):
        tiles = first + tl.arange(0, TILES)
        columns = tiles[:, None] * _TILE + tl.arange(0, _TILE)[None, :]
        # The pitch is a multiple of 16, so the mask leaves the loads 128 bits wide.
        inside = columns < pitch
        log_p = tl.load(s_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.load(delta_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        log_p += tl.load(scale_ptr + tiles, mask=tiles < n_tiles, other=0.0)[:, None]
        x += tl.load(shift_ptr + tiles, mask=tiles < n_tiles, other=0.0)[:, None]
        p = tl.exp(log_p)
        g = p * x * factor
        if SOFTCAP:
            tanh = tl.maximum((log_p + logsumexp) * inverse_outer, -1.0)
            g *= 1.0 - tanh * tanh
        tl.store(g_ptr + columns, g.to(g_ptr.dtype.element_ty), mask=inside)
        series = x * x * (0.5 + x * (-1.0 / 6 + x * (1.0 / 24 + x * (-1.0 / 120 + x * (1.0 / 720)))))
        q = tl.exp(tl.minimum(log_p - x, _EXPONENT))
        phi += tl.where(tl.abs(x) < 0.25, p * series, q - p + p * x)
    tl.store(phi_ptr + row, tl.sum(tl.sum(phi, 1), 0))


def dual_gradient(
    out_s: Tensor,  # (n, pitch) float16
    out_difference: Tensor,  # (n, pitch) float16
    tiles: Tensor,  # (planes, n_tiles, n) float32
    row_weights: Tensor,  # (n,) float32
    statistics: Tensor,  # (5, n) float32
    gradient: Tensor,  # (n, pitch) float32 or bf16; may be out_s.view(torch.bfloat16)
    *,
    scale_s: float,
    softcap_s: float | None,
    temperature: float,
    all_statistics: bool,
) -> None:
    """Merge the tiles and launch one program per row. Arguments as in `reference_dual.dual_gradient`."""
    n, pitch = out_s.shape
    for name, x in (("out_s", out_s), ("out_difference", out_difference), ("gradient", gradient)):
        if tuple(x.shape) != (n, pitch) or x.stride(1) != 1 or pitch % 16:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; expected {(n, pitch)} with unit "
                "column stride, the second a multiple of 16"
            )
    if n == 0:
        return
    merged = merge_tiles(tiles)
    factor = gradient_factor(row_weights, merged, scale_s, temperature)
    phi = torch.empty_like(merged.logsumexp)
    _dual_gradient_kernel[(n,)](
        out_s, out_difference, merged.offsets[0], merged.offsets[1], factor, merged.logsumexp, phi, gradient,
        out_s.stride(0), out_difference.stride(0), gradient.stride(0), pitch, tiles.shape[1],
        1.0 if softcap_s is None else temperature / softcap_s,
        SOFTCAP=softcap_s is not None, TILES=TILES, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    statistics[0] = finish_kl(phi, merged)
    if all_statistics:
        merge_other_statistics(tiles, merged, statistics)

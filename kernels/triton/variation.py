"""The total variation of two rows of float32 logits, sum |p - q| / 2, a row split over programs (Triton)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from opcd_fast.kernels.triton.logits import Pair, load_pair
from opcd_fast.kernels.triton.statistics import merged, padded, pieces_of


@triton.jit
def _variation_kernel(
    z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, factor_s_ptr, factor_t_ptr, pieces_ptr, variation_ptr,
    stride_s, stride_t, n_rows, n_columns, n_pieces, blocks, inner_s, inner_t, outer_s, outer_t,
    HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr,
    DIFFERENCE: tl.constexpr, PLANES: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum |p - q| / 2 of every row and split."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    z_s_ptr += row * stride_s
    z_t_ptr += row * stride_t
    lanes = tl.arange(0, BLOCK)
    whole = n_columns // BLOCK
    first = split * blocks
    last = tl.minimum(first + blocks, whole)
    if DIFFERENCE:
        inner_s *= tl.load(factor_s_ptr + row)
        inner_t *= tl.load(factor_t_ptr + row)
    place, there = pieces_of(pieces_ptr, row, n_rows, n_pieces, PLANES, PIECES)
    lse_s = merged(place, there, n_rows)[1]
    lse_t = merged(place + 2 * n_rows, there, n_rows)[1]
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(first, last):
        columns = block * BLOCK + lanes
        z_s, z_t, _ = load_pair(
            z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, columns, n_columns, inner_s, inner_t, outer_s, outer_t,
            HAS_BIAS_S, HAS_BIAS_T, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, False,
        )  # fmt: skip
        total += tl.abs(tl.exp(z_s - lse_s) - tl.exp(z_t - lse_t))
    if (split == tl.num_programs(1) - 1) & (whole * BLOCK < n_columns):
        columns = whole * BLOCK + lanes
        z_s, z_t, _ = load_pair(
            z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, columns, n_columns, inner_s, inner_t, outer_s, outer_t,
            HAS_BIAS_S, HAS_BIAS_T, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, True,
        )  # fmt: skip
        total += tl.abs(tl.exp(z_s - lse_s) - tl.exp(z_t - lse_t))
    tl.store(variation_ptr + split.to(tl.int64) * n_rows + row, 0.5 * tl.sum(total, 0))


def total_variation(
    pair: Pair,
    pieces: Tensor,  # (pieces, planes, n) of the first pass, which cover the whole vocabulary
    columns: int,
    splits: int,  # of a row, and whole blocks in each
    blocks: int,
    tuning: dict[str, Any],  # BLOCK and the launch's options
) -> Tensor:
    """(splits, n): of each split, or of its slice of the vocabulary, its part of the sum."""
    n = pieces.shape[2]
    variation = pieces.new_empty(splits, n)
    _variation_kernel[(n, splits)](
        *pair.pointers, *pair.factors, pieces, variation, *pair.strides, n, columns, len(pieces), blocks,
        *pair.transforms, DIFFERENCE=pair.difference, PLANES=pieces.shape[1], PIECES=padded(len(pieces)),
        **pair.options, **tuning,
    )  # fmt: skip
    return variation

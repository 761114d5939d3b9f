"""Log-probability of one token, entropy and gradient from a row of float32 logits, one program per row (Triton).

The twin of `reference.logprobs.logprob_rows`, where the formulas are. Both statistics come from one pass: with m the
running maximum, d = sum exp(z - m) and a = sum exp(z - m) (z - m),

    log p(token) = (z[token] - m) - log d        entropy = log d - a / d

of which the two parts of the entropy are >= 0. The gradient is a second pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from opcd_fast.kernels.reference import Logits
from opcd_fast.kernels.triton.launch_shapes import launch_shape
from opcd_fast.kernels.triton.logits import UNSEEN, check_logits, load_logits, store_gradient


@triton.jit
def _accumulate(z, m, d, a):
    distance = tl.abs(z - m)
    shrink = tl.exp(-distance)
    step = tl.where(shrink == 0.0, 0.0, shrink * distance)  # 0 * inf for forbidden tokens
    grows = z > m
    a = tl.where(grows, a * shrink - d * step, a - step)
    d = tl.where(grows, d * shrink + 1.0, d + shrink)
    return tl.where(grows, z, m), d, a


@triton.jit
def _write_gradient(z, columns, n_columns, g_ptr, token, lse, token_value, row_factor, inverse_outer, SOFTCAP, MASKED):
    g = tl.where(columns == token, token_value, -tl.exp(z - lse)) * row_factor
    store_gradient(g_ptr, g, z, columns, n_columns, inverse_outer, SOFTCAP, MASKED)


@triton.jit
def _logprob_rows_kernel(
    z_ptr, bias_ptr, token_ptr, weights_ptr, statistics_ptr, g_ptr,
    stride_z, stride_g, stride_statistics, n_columns, inner, outer, derivative,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, WRITE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows * stride passes 2^31
    z_ptr += row * stride_z
    lanes = tl.arange(0, BLOCK)
    whole = n_columns // BLOCK
    tail = whole * BLOCK + lanes
    token = tl.load(token_ptr + row)
    token = tl.where((token >= 0) & (token < n_columns), token, n_columns).to(tl.int32)
    z_token = load_logits(z_ptr, bias_ptr, token, n_columns, inner, outer, HAS_BIAS, SOFTCAP, True)

    m = tl.full([BLOCK], UNSEEN, tl.float32)
    d = tl.zeros([BLOCK], tl.float32)
    a = tl.zeros([BLOCK], tl.float32)
    for block in range(0, whole):
        columns = block * BLOCK + lanes
        z = load_logits(z_ptr, bias_ptr, columns, n_columns, inner, outer, HAS_BIAS, SOFTCAP, False)
        m, d, a = _accumulate(z, m, d, a)
    if whole * BLOCK < n_columns:
        z = load_logits(z_ptr, bias_ptr, tail, n_columns, inner, outer, HAS_BIAS, SOFTCAP, True)
        m, d, a = _accumulate(z, m, d, a)

    top = tl.max(m, 0)
    scaled = tl.exp(m - top)
    total = tl.sum(d * scaled, 0)
    weighted = tl.sum(tl.where(d == 0.0, 0.0, (a + d * (m - top)) * scaled), 0)
    log_total = tl.log(total)
    logprob = (z_token - top) - log_total
    tl.store(statistics_ptr + row, logprob)
    tl.store(statistics_ptr + stride_statistics + row, log_total - weighted / total)

    if WRITE_GRADIENT:
        g_ptr += row * stride_g
        lse = top + log_total
        token_value = 1.0 - tl.exp(logprob)  # the rounding of lse would show where the token is nearly certain
        row_factor = tl.load(weights_ptr + row) * derivative
        row_factor = tl.where(logprob == float("-inf"), 0.0, row_factor)
        inverse_outer = 0.0
        if SOFTCAP:
            inverse_outer = 1.0 / outer
        # Backwards: the end of the row is what the cache may still hold.
        if whole * BLOCK < n_columns:
            z = load_logits(z_ptr, bias_ptr, tail, n_columns, inner, outer, HAS_BIAS, SOFTCAP, True)
            _write_gradient(
                z, tail, n_columns, g_ptr, token, lse, token_value, row_factor, inverse_outer, SOFTCAP, True
            )
        for block in range(0, whole):
            columns = (whole - 1 - block) * BLOCK + lanes
            z = load_logits(z_ptr, bias_ptr, columns, n_columns, inner, outer, HAS_BIAS, SOFTCAP, False)
            _write_gradient(
                z, columns, n_columns, g_ptr, token, lse, token_value, row_factor, inverse_outer, SOFTCAP, False
            )


def logprob_rows(
    logits: Logits,  # z (n, V) float32, unit column stride
    token_ids: Tensor,  # (n,) int64; one outside 0..V-1 counts as a token of probability 0
    row_weights: Tensor,  # (n,) float32
    statistics: Tensor,  # (2, n) float32
    gradient: Tensor | None,  # (n, V) float32 or bf16; may be z itself, but no other view of its memory
    *,
    scratch: Tensor | None = None,  # the torch version's; unused
) -> None:
    """One program per row. Arguments as in `reference.logprobs.logprob_rows`; z survives unless the gradient is z."""
    z, bias, _, softcap, *_ = logits
    check_logits("z", z)
    rows, columns = z.shape
    if rows == 0:
        return
    block, warps = launch_shape("logprob_rows", columns)
    _logprob_rows_kernel[(rows,)](
        z, z if bias is None else bias, token_ids, row_weights, statistics, z if gradient is None else gradient,
        z.stride(0), 0 if gradient is None else gradient.stride(0), statistics.stride(0), columns,
        *logits.inner_and_outer(), logits.derivative,
        HAS_BIAS=bias is not None, SOFTCAP=softcap is not None, WRITE_GRADIENT=gradient is not None, BLOCK=block,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip

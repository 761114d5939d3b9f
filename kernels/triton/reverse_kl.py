"""Statistics and gradient of the reverse KL, or the gated one, from two rows of float32 logits (Triton).

The twin of `reference.divergences.divergence_rows` for these two, one program per row. What differs here:

- Two passes over the row. The first keeps a running maximum, normaliser and sum of differences per lane and
  combines the lanes once at the end, so its loop has no barrier and no shuffle. The second writes G and sums
  the KL.
- G needs c = E_p[z_s - z_t], known after the first pass; the two logsumexps cancel in l - KL. The gate 1 - exp(-KL) is
  then known as well.
- expm1 does not exist here. Where |l| < 1/4 the term p (expm1(-l) + l) is a polynomial of relative error
  4e-7, elsewhere q - p + p l, which has lost at most a factor 30 of float32's precision there.
- The columns beyond the last whole block are peeled off: with a mask in the loop, or with rows that do not
  start at multiples of 16 elements, every 128-bit load would turn into four.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from opcd_fast.kernels.reference import Logits
from opcd_fast.kernels.triton.launch_shapes import launch_shape
from opcd_fast.kernels.triton.logits import (
    MOST_REGISTERS,
    NO_COLUMN,
    SMALLEST,
    UNSEEN,
    Pair,
    accumulate,
    difference_of,
    expm1,
    gated_terms,
    load_logits,
    psi_terms,
    store_gradient,
)


@triton.jit
def _accumulate(z_s, z_t, m_s, d_s, a, m_t, d_t, forbidden, GATED):
    """Online max, sum of exponentials and their sum weighted with z_s - z_t: one exponential a side. For the gate also
    the largest logit of a token that the teacher forbids."""
    shrink = tl.exp(-tl.abs(z_s - m_s))
    grows = z_s > m_s
    difference = difference_of(z_s, z_t)
    d_s = tl.where(grows, d_s * shrink + 1.0, d_s + shrink)
    a = tl.where(grows, a * shrink + difference, a + shrink * difference)
    m_s = tl.where(grows, z_s, m_s)
    m_t, d_t = accumulate(z_t, m_t, d_t)
    if GATED:
        forbidden = tl.maximum(forbidden, tl.where(z_t == float("-inf"), z_s, float("-inf")))
    return m_s, d_s, a, m_t, d_t, forbidden


@triton.jit
def _kl_terms(p, q, l, forbidden):
    """q - p + p l, every one >= 0; inf where the teacher forbids what the student may say."""
    terms = tl.where(forbidden, float("inf"), psi_terms(p, q, l))
    return tl.where(p < SMALLEST, q, terms)


@triton.jit
def _second_pass(
    z_s, z_t, columns, n_columns, g_ptr, kl, negative_entropy, top_s, top_t,
    lse_s, lse_t, log_ratio, m_s, m_t, center, gate, rest, row_factor, inverse_outer,
    GATED, SOFTCAP, WRITE_GRADIENT, ALL_STATISTICS, MASKED,
):  # fmt: skip
    p = tl.exp(z_s - lse_s)
    q = tl.exp(z_t - lse_t)
    difference = difference_of(z_s, z_t)
    if GATED:
        terms, share, excess = gated_terms(p, q, difference - log_ratio, gate, rest)
        kl += tl.where((z_s == float("-inf")) & (q >= SMALLEST), float("inf"), terms)
    else:
        kl += _kl_terms(p, q, difference - (lse_s - lse_t), z_t == float("-inf"))
    if ALL_STATISTICS:
        negative_entropy += tl.where(z_s == float("-inf"), 0.0, p * (z_s - lse_s))
        top_s = tl.minimum(top_s, tl.where(z_s >= m_s, columns, NO_COLUMN))
        top_t = tl.minimum(top_t, tl.where(z_t >= m_t, columns, NO_COLUMN))
    if WRITE_GRADIENT:
        if GATED:
            g = (share * (difference - center) + gate * excess) * row_factor
        else:
            g = p * (difference - center) * row_factor
        store_gradient(g_ptr, g, z_s, columns, n_columns, inverse_outer, SOFTCAP, MASKED)
    return kl, negative_entropy, top_s, top_t


@triton.jit
def _reverse_kl_rows_kernel(
    z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, weights_ptr, statistics_ptr, g_ptr,
    stride_s, stride_t, stride_g, stride_statistics, n_columns,
    inner_s, inner_t, outer_s, outer_t, derivative,
    HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr,
    GATED: tl.constexpr, WRITE_GRADIENT: tl.constexpr, ALL_STATISTICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows * stride passes 2^31
    z_s_ptr += row * stride_s
    z_t_ptr += row * stride_t
    lanes = tl.arange(0, BLOCK)
    whole = n_columns // BLOCK
    tail = whole * BLOCK + lanes

    m_s = tl.full([BLOCK], UNSEEN, tl.float32)
    m_t = tl.full([BLOCK], UNSEEN, tl.float32)
    d_s = tl.zeros([BLOCK], tl.float32)
    d_t = tl.zeros([BLOCK], tl.float32)
    a = tl.zeros([BLOCK], tl.float32)
    forbidden = tl.full([BLOCK], float("-inf"), tl.float32)
    for block in range(0, whole):
        columns = block * BLOCK + lanes
        z_s = load_logits(z_s_ptr, bias_s_ptr, columns, n_columns, inner_s, outer_s, HAS_BIAS_S, SOFTCAP_S, False)
        z_t = load_logits(z_t_ptr, bias_t_ptr, columns, n_columns, inner_t, outer_t, HAS_BIAS_T, SOFTCAP_T, False)
        m_s, d_s, a, m_t, d_t, forbidden = _accumulate(z_s, z_t, m_s, d_s, a, m_t, d_t, forbidden, GATED)
    if whole * BLOCK < n_columns:
        z_s = load_logits(z_s_ptr, bias_s_ptr, tail, n_columns, inner_s, outer_s, HAS_BIAS_S, SOFTCAP_S, True)
        z_t = load_logits(z_t_ptr, bias_t_ptr, tail, n_columns, inner_t, outer_t, HAS_BIAS_T, SOFTCAP_T, True)
        m_s, d_s, a, m_t, d_t, forbidden = _accumulate(z_s, z_t, m_s, d_s, a, m_t, d_t, forbidden, GATED)

    top = tl.max(m_s, 0)
    scaled = tl.exp(m_s - top)
    total = tl.sum(d_s * scaled, 0)
    center = tl.sum(a * scaled, 0) / total
    lse_s = top + tl.log(total)
    m_s = top
    top = tl.max(m_t, 0)
    total_t = tl.sum(d_t * tl.exp(m_t - top), 0)
    lse_t = top + tl.log(total_t)
    m_t = top
    log_ratio = 0.0
    gate = 0.0
    rest = 1.0
    if GATED:
        log_ratio = (m_s - m_t) + tl.log(total / total_t)  # lse_s - lse_t without the rounding of either
        # Rounding leaves the KL below 0 at times; NaN stays.
        distance = center - log_ratio
        distance = tl.where(distance < 0.0, 0.0, distance)
        distance = tl.where(tl.exp(tl.max(forbidden, 0) - lse_s) >= SMALLEST, float("inf"), distance)
        gate = -expm1(-distance)
        rest = tl.exp(-distance)
        # Closed, the gate keeps out whatever the reverse KL is.
        center = tl.where(rest == 0.0, 0.0, center)

    row_factor = 0.0
    inverse_outer = 0.0
    if WRITE_GRADIENT:
        g_ptr += row * stride_g
        row_factor = tl.load(weights_ptr + row) * derivative
    if SOFTCAP_S:
        inverse_outer = 1.0 / outer_s

    kl = tl.zeros([BLOCK], tl.float32)
    negative_entropy = tl.zeros([BLOCK], tl.float32)
    top_s = tl.full([BLOCK], NO_COLUMN, tl.int32)
    top_t = tl.full([BLOCK], NO_COLUMN, tl.int32)
    # Backwards: the end of the row is what the cache may still hold.
    if whole * BLOCK < n_columns:
        z_s = load_logits(z_s_ptr, bias_s_ptr, tail, n_columns, inner_s, outer_s, HAS_BIAS_S, SOFTCAP_S, True)
        z_t = load_logits(z_t_ptr, bias_t_ptr, tail, n_columns, inner_t, outer_t, HAS_BIAS_T, SOFTCAP_T, True)
        kl, negative_entropy, top_s, top_t = _second_pass(
            z_s, z_t, tail, n_columns, g_ptr, kl, negative_entropy, top_s, top_t,
            lse_s, lse_t, log_ratio, m_s, m_t, center, gate, rest, row_factor, inverse_outer,
            GATED, SOFTCAP_S, WRITE_GRADIENT, ALL_STATISTICS, True,
        )  # fmt: skip
    for block in range(0, whole):
        columns = (whole - 1 - block) * BLOCK + lanes
        z_s = load_logits(z_s_ptr, bias_s_ptr, columns, n_columns, inner_s, outer_s, HAS_BIAS_S, SOFTCAP_S, False)
        z_t = load_logits(z_t_ptr, bias_t_ptr, columns, n_columns, inner_t, outer_t, HAS_BIAS_T, SOFTCAP_T, False)
        kl, negative_entropy, top_s, top_t = _second_pass(
            z_s, z_t, columns, n_columns, g_ptr, kl, negative_entropy, top_s, top_t,
            lse_s, lse_t, log_ratio, m_s, m_t, center, gate, rest, row_factor, inverse_outer,
            GATED, SOFTCAP_S, WRITE_GRADIENT, ALL_STATISTICS, False,
        )  # fmt: skip

    total = tl.sum(kl, 0)
    if WRITE_GRADIENT:  # noqa: SIM102 (known at compile time; the next is not)
        # Rare, so it costs a third pass instead of a register in the first. The sum above was a barrier.
        if total == float("inf"):
            for block in range(0, whole + 1):
                columns = block * BLOCK + lanes
                nothing = tl.zeros([BLOCK], g_ptr.dtype.element_ty)
                tl.store(g_ptr + columns, nothing, mask=columns < n_columns)

    statistics_ptr += row
    tl.store(statistics_ptr, total)
    if ALL_STATISTICS:
        agree = tl.min(top_s, 0) == tl.min(top_t, 0)
        tl.store(statistics_ptr + stride_statistics, -tl.sum(negative_entropy, 0))
        tl.store(statistics_ptr + 2 * stride_statistics, lse_s)
        tl.store(statistics_ptr + 3 * stride_statistics, lse_t)
        tl.store(statistics_ptr + 4 * stride_statistics, agree.to(tl.float32))
        if GATED:
            tl.store(statistics_ptr + 5 * stride_statistics, gate)


def reverse_kl_rows(
    student: Logits,  # z (n, V) float32, unit column stride
    teacher: Logits,
    row_weights: Tensor,  # (n,) float32
    statistics: Tensor,  # (6, n) float32
    gradient: Tensor | None,  # (n, V) float32 or bf16; may be the student's z, but no other view of the logits' memory
    *,
    gated: bool = False,
    all_statistics: bool = True,
    scratch: Tensor | None = None,  # the reference's; unused
) -> None:
    """One program per row. `reference.divergences.divergence_rows` of the reverse KL, or where it is gated of gated_kl
    with the gate "kl"; the logits survive unless the gradient is the student's z."""
    pair = Pair.of(student, teacher)
    rows, columns = student.z.shape
    if rows == 0:
        return
    block, warps = launch_shape("reverse_kl_rows", columns)
    _reverse_kl_rows_kernel[(rows,)](
        *pair.pointers, row_weights, statistics, student.z if gradient is None else gradient,
        *pair.strides, 0 if gradient is None else gradient.stride(0), statistics.stride(0),
        columns, *pair.transforms, student.derivative, **pair.options,
        GATED=gated, WRITE_GRADIENT=gradient is not None, ALL_STATISTICS=all_statistics, BLOCK=block,
        num_warps=warps, enable_fp_fusion=True, maxnreg=MOST_REGISTERS if gated else None,
    )  # fmt: skip

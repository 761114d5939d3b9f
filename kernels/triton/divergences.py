"""Statistics and gradient of every divergence from two rows of float32 logits, a row split over programs (Triton).

The twin of `reference.divergences.divergence_rows`, where the formulas are, and of `reference.differences`, whose
float16 numbers it reads in place of logits with half of the bytes. Kernels over (rows, splits):

- `_normaliser_kernel`: maximum and sum of exponentials of each side and, for the reverse KL, the sum of differences
  that gives its gradient and its value for a gate; and the largest logit of a token that the other side forbids, so
  that infinite rows are known before any gradient is written.
- `_terms_kernel`: the terms of value and entropy, the gradient, or both.
- `total_variation`, between them for the gate "tv" alone, is in variation.py.

What the splits of a row leave, a few floats each, every program of the next kernel merges for itself, as statistics.py
has it; the kernel that writes the statistics in the end is there too. The reverse, the forward and the gated KL take
the first two passes, 18 bytes per logit with a bf16 gradient; the gate "tv" reads the logits a third time, 26 bytes. So
do the others, which know c = E_p[phi] only after their terms.

Running maxima and sums are kept per lane and combined once at the end, so loops have no barrier and no shuffle. The
columns beyond the last whole block are peeled off: with a mask in the loop, or with rows that do not start at multiples
of 16 elements, every 128-bit load would turn into four. expm1 does not exist here; terms without cancellation are in
logits.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from opcd_fast.kernels.reference import (
    DIVERGENCES,
    NORMALISERS,
    TERMS,
    Gather,
    Logits,
    merge_normalisers,
    merge_terms,
    row_of,
)
from opcd_fast.kernels.triton.launch_shapes import launch_shape
from opcd_fast.kernels.triton.logits import (
    MOST_REGISTERS,
    NO_COLUMN,
    SMALLEST,
    UNSEEN,
    Pair,
    accumulate,
    expm1,
    gated_terms,
    load_pair,
    psi_terms,
    store_gradient,
)
from opcd_fast.kernels.triton.statistics import (
    FORWARD_KL,
    GATED_KL,
    PROGRAMS,
    REVERSE_KL,
    known_of,
    merging,
    pieces_of,
    write_statistics,
)
from opcd_fast.kernels.triton.variation import total_variation

_JSD = tl.constexpr(DIVERGENCES["jsd"].code)
_SKEW_REVERSE_KL = tl.constexpr(DIVERGENCES["skew_reverse_kl"].code)
_SKEW_FORWARD_KL = tl.constexpr(DIVERGENCES["skew_forward_kl"].code)
# exp(87.8) and its inverse are normal numbers; a probability whose ratio to the other is beyond has underflown
_LIMIT = tl.constexpr(87.8)


@triton.jit
def _first_pass(z_s, z_t, difference, m_s, d_s, m_t, d_t, a, forbidden_s, forbidden_t, DIVERGENCE):
    if DIVERGENCE == REVERSE_KL or DIVERGENCE == GATED_KL:  # noqa: SIM109 (Triton knows no membership)
        shrink = tl.exp(-tl.abs(z_s - m_s))
        a = tl.where(z_s > m_s, a * shrink + difference, a + shrink * difference)
        forbidden_s = tl.maximum(forbidden_s, tl.where(z_t == float("-inf"), z_s, float("-inf")))
    if DIVERGENCE == FORWARD_KL or DIVERGENCE == GATED_KL:  # noqa: SIM109
        forbidden_t = tl.maximum(forbidden_t, tl.where(z_s == float("-inf"), z_t, float("-inf")))
    m_s, d_s = accumulate(z_s, m_s, d_s)
    m_t, d_t = accumulate(z_t, m_t, d_t)
    return m_s, d_s, m_t, d_t, a, forbidden_s, forbidden_t


@triton.jit
def _normaliser_kernel(
    z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, factor_s_ptr, factor_t_ptr, pieces_ptr,
    stride_s, stride_t, n_rows, n_columns, blocks, inner_s, inner_t, outer_s, outer_t,
    HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr,
    DIFFERENCE: tl.constexpr, DIVERGENCE: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows * stride passes 2^31
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

    m_s = tl.full([BLOCK], UNSEEN, tl.float32)
    m_t = tl.full([BLOCK], UNSEEN, tl.float32)
    d_s = tl.zeros([BLOCK], tl.float32)
    d_t = tl.zeros([BLOCK], tl.float32)
    a = tl.zeros([BLOCK], tl.float32)
    forbidden_s = tl.full([BLOCK], float("-inf"), tl.float32)
    forbidden_t = tl.full([BLOCK], float("-inf"), tl.float32)
    for block in range(first, last):
        columns = block * BLOCK + lanes
        z_s, z_t, difference = load_pair(
            z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, columns, n_columns, inner_s, inner_t, outer_s, outer_t,
            HAS_BIAS_S, HAS_BIAS_T, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, False,
        )  # fmt: skip
        m_s, d_s, m_t, d_t, a, forbidden_s, forbidden_t = _first_pass(
            z_s, z_t, difference, m_s, d_s, m_t, d_t, a, forbidden_s, forbidden_t, DIVERGENCE
        )
    if (split == tl.num_programs(1) - 1) & (whole * BLOCK < n_columns):
        columns = whole * BLOCK + lanes
        z_s, z_t, difference = load_pair(
            z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, columns, n_columns, inner_s, inner_t, outer_s, outer_t,
            HAS_BIAS_S, HAS_BIAS_T, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, True,
        )  # fmt: skip
        m_s, d_s, m_t, d_t, a, forbidden_s, forbidden_t = _first_pass(
            z_s, z_t, difference, m_s, d_s, m_t, d_t, a, forbidden_s, forbidden_t, DIVERGENCE
        )

    pieces_ptr += split.to(tl.int64) * PLANES * n_rows + row
    top = tl.max(m_s, 0)
    scaled = tl.exp(m_s - top)
    tl.store(pieces_ptr, top)
    tl.store(pieces_ptr + n_rows, tl.sum(d_s * scaled, 0))
    if PLANES > 4:
        tl.store(pieces_ptr + 4 * n_rows, tl.sum(a * scaled, 0))
        tl.store(pieces_ptr + 5 * n_rows, tl.max(forbidden_s, 0))
        tl.store(pieces_ptr + 6 * n_rows, tl.max(forbidden_t, 0))
    top = tl.max(m_t, 0)
    tl.store(pieces_ptr + 2 * n_rows, top)
    tl.store(pieces_ptr + 3 * n_rows, tl.sum(d_t * tl.exp(m_t - top), 0))


@triton.jit
def _log_ratio_to_mixture(l, w, rest):
    """x = log(p / m), m / p - 1 and m / p, for m = rest p + w q, rest = 1 - w and l = log(p / q)."""
    excess = w * expm1(-l)
    ratio = rest + w * tl.exp(-l)
    # log1p(e) = 2 atanh(s)
    s = excess / (2.0 + excess)
    square = s * s
    series = 2.0 * s * (1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9)))))
    return -tl.where(tl.abs(excess) < 0.25, series, tl.log(ratio)), excess, ratio


@triton.jit
def _terms_and_p_phi(p, q, z_s, z_t, difference, log_ratio, shift, gate, rest, parameter, DIVERGENCE):
    """Terms of the value, and p times (phi - shift); of the gated KL the shift is that of its reverse part."""
    if DIVERGENCE == REVERSE_KL:
        # E_p[z_s - z_t] is the shift, so the two logsumexps cancel in l - KL.
        terms = tl.where(p < SMALLEST, q, psi_terms(p, q, difference - log_ratio))
        p_phi = p * (difference - shift)
    elif DIVERGENCE == FORWARD_KL:
        # Where one side is -inf, l is wrong: if it is the student's, the row is infinite, and else q underflows.
        l = difference - log_ratio
        terms = tl.where(q < SMALLEST, p, psi_terms(q, p, -l))
        p_phi = tl.where((tl.abs(l) < 0.25) & (q >= SMALLEST), -p * expm1(-l), p - q)
    elif DIVERGENCE == GATED_KL:
        terms, share, excess = gated_terms(p, q, difference - log_ratio, gate, rest)
        p_phi = share * (difference - shift) + gate * excess
    else:
        # Finite also where one is forbidden, or both (where the difference is not a number, and p = q = 0).
        l = z_s - z_t - log_ratio
        l = tl.where(l < _LIMIT, l, _LIMIT)
        l = tl.where(l > -_LIMIT, l, -_LIMIT)
        if DIVERGENCE == _JSD:
            x, _, _ = _log_ratio_to_mixture(l, parameter, rest)
            m = rest * p + parameter * q
            terms = rest * psi_terms(p, m, x) + parameter * psi_terms(q, m, x - l)
            p_phi = p * (rest * x - shift)
        elif DIVERGENCE == _SKEW_REVERSE_KL:
            x, excess, ratio = _log_ratio_to_mixture(l, rest, parameter)
            terms = psi_terms(p, parameter * p + rest * q, x)
            share = excess / ratio
            near = terms - p * (share * (excess + rest))  # where the two parts of phi cancel but for these
            p_phi = tl.where(tl.abs(x) < 0.25, near, p * (x + parameter * share)) - p * shift
        else:
            tl.static_assert(DIVERGENCE == _SKEW_FORWARD_KL, "unknown divergence")
            y, excess, ratio = _log_ratio_to_mixture(-l, rest, parameter)
            terms = psi_terms(q, parameter * q + rest * p, y)
            p_phi = p * (rest * (excess / ratio) - shift)
    return terms, p_phi


@triton.jit
def _second_pass(
    z_s, z_t, difference, columns, n_columns, g_ptr, value, negative_entropy, top_s, top_t, moment,
    m_s, m_t, lse_s, lse_t, log_ratio, shift, row_factor, gate, rest, parameter, inverse_outer,
    SOFTCAP, DIVERGENCE, WRITE_TERMS, WRITE_MOMENT, WRITE_GRADIENT, ALL_STATISTICS, MASKED,
):  # fmt: skip
    p = tl.exp(z_s - lse_s)
    q = tl.exp(z_t - lse_t)
    terms, p_phi = _terms_and_p_phi(p, q, z_s, z_t, difference, log_ratio, shift, gate, rest, parameter, DIVERGENCE)
    if WRITE_TERMS:
        value += terms
        if WRITE_MOMENT:
            moment += p_phi
        if ALL_STATISTICS:
            negative_entropy += tl.where(p < SMALLEST, 0.0, p * (z_s - lse_s))
            top_s = tl.minimum(top_s, tl.where(z_s >= m_s, columns, NO_COLUMN))
            top_t = tl.minimum(top_t, tl.where(z_t >= m_t, columns, NO_COLUMN))
    if WRITE_GRADIENT:
        g = tl.where(row_factor == 0.0, 0.0, p_phi * row_factor)  # whatever there is in a row that gives none
        store_gradient(g_ptr, g, z_s, columns, n_columns, inverse_outer, SOFTCAP, MASKED)
    return value, negative_entropy, top_s, top_t, moment


@triton.jit
def _terms_kernel(
    z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, factor_s_ptr, factor_t_ptr, weights_ptr, pieces_ptr, variation_ptr,
    terms_ptr, g_ptr, stride_s, stride_t, stride_g, n_rows, n_columns, n_pieces, blocks, first_column,
    inner_s, inner_t, outer_s, outer_t, derivative, parameter, remainder,
    HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr,
    DIVERGENCE: tl.constexpr, DIFFERENCE: tl.constexpr, VARIATION: tl.constexpr, PLANES: tl.constexpr,
    PIECES: tl.constexpr, TERMS: tl.constexpr, WRITE_TERMS: tl.constexpr, WRITE_MOMENT: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr, ALL_STATISTICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Backwards, and so are the columns: what was read last is what the cache may still hold.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    split = tl.num_programs(1) - 1 - tl.program_id(1)
    z_s_ptr += row * stride_s
    z_t_ptr += row * stride_t
    g_ptr += row * stride_g
    lanes = tl.arange(0, BLOCK)
    whole = n_columns // BLOCK
    first = split * blocks
    last = tl.minimum(first + blocks, whole)
    if DIFFERENCE:
        inner_s *= tl.load(factor_s_ptr + row)
        inner_t *= tl.load(factor_t_ptr + row)

    m_s, m_t, lse_s, lse_t, log_ratio, shift, gate, rest, verdict = known_of(
        pieces_ptr, variation_ptr, row, n_rows, n_pieces, DIVERGENCE, DIFFERENCE, VARIATION, PLANES, PIECES
    )
    if DIVERGENCE != GATED_KL:
        rest = remainder
    if not WRITE_TERMS:
        place, there = pieces_of(terms_ptr, row, n_rows, n_pieces, TERMS, PIECES)
        value = tl.sum(tl.load(place, mask=there, other=0.0), 0)
        shift = tl.sum(tl.load(place + 4 * n_rows, mask=there, other=0.0), 0)
        # A teacher's NaN reaches every term, but phi only through here.
        shift = tl.where(value == value, shift, value)
    row_factor = 0.0
    if WRITE_GRADIENT:
        row_factor = tl.where(verdict == 0.0, tl.load(weights_ptr + row) * derivative, 0.0)
    inverse_outer = 0.0
    if SOFTCAP_S:
        inverse_outer = 1.0 / outer_s

    value = tl.zeros([BLOCK], tl.float32)
    negative_entropy = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    top_s = tl.full([BLOCK], NO_COLUMN, tl.int32)
    top_t = tl.full([BLOCK], NO_COLUMN, tl.int32)
    if (split == tl.num_programs(1) - 1) & (whole * BLOCK < n_columns):
        columns = whole * BLOCK + lanes
        z_s, z_t, difference = load_pair(
            z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, columns, n_columns, inner_s, inner_t, outer_s, outer_t,
            HAS_BIAS_S, HAS_BIAS_T, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, True,
        )  # fmt: skip
        value, negative_entropy, top_s, top_t, moment = _second_pass(
            z_s, z_t, difference, columns, n_columns, g_ptr, value, negative_entropy, top_s, top_t, moment,
            m_s, m_t, lse_s, lse_t, log_ratio, shift, row_factor, gate, rest, parameter, inverse_outer,
            SOFTCAP_S, DIVERGENCE, WRITE_TERMS, WRITE_MOMENT, WRITE_GRADIENT, ALL_STATISTICS, True,
        )  # fmt: skip
    for block in range(first, last):
        columns = (first + last - 1 - block) * BLOCK + lanes
        z_s, z_t, difference = load_pair(
            z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, columns, n_columns, inner_s, inner_t, outer_s, outer_t,
            HAS_BIAS_S, HAS_BIAS_T, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, False,
        )  # fmt: skip
        value, negative_entropy, top_s, top_t, moment = _second_pass(
            z_s, z_t, difference, columns, n_columns, g_ptr, value, negative_entropy, top_s, top_t, moment,
            m_s, m_t, lse_s, lse_t, log_ratio, shift, row_factor, gate, rest, parameter, inverse_outer,
            SOFTCAP_S, DIVERGENCE, WRITE_TERMS, WRITE_MOMENT, WRITE_GRADIENT, ALL_STATISTICS, False,
        )  # fmt: skip

    if WRITE_TERMS:
        terms_ptr += split.to(tl.int64) * TERMS * n_rows + row
        tl.store(terms_ptr, tl.sum(value, 0))
        if WRITE_MOMENT:
            tl.store(terms_ptr + 4 * n_rows, tl.sum(moment, 0))
        if ALL_STATISTICS:
            tl.store(terms_ptr + n_rows, tl.sum(negative_entropy, 0))
            column = tl.min(top_s, 0)
            column = tl.where(column == NO_COLUMN, float("inf"), (first_column + column).to(tl.float32))
            tl.store(terms_ptr + 2 * n_rows, column)
            column = tl.min(top_t, 0)
            column = tl.where(column == NO_COLUMN, float("inf"), (first_column + column).to(tl.float32))
            tl.store(terms_ptr + 3 * n_rows, column)


def split_blocks(rows: int, columns: int, block: int, splits: int | None = None) -> tuple[int, int]:
    """(splits of a row, whole blocks in each): a function of the shape alone, so results repeat bit for bit.

    splits: for tests; as many, or as many as the row has whole blocks.
    """
    whole = columns // block
    if splits is None:
        splits = -(-PROGRAMS // rows)
    blocks = max(1, -(-whole // splits))
    return max(1, -(-whole // blocks)), blocks


def divergence_rows(
    student: Logits,  # z (n, V) float32, unit column stride
    teacher: Logits,
    row_weights: Tensor,  # (n,) float32
    statistics: Tensor,  # (6, n) float32
    gradient: Tensor | None,  # (n, V) float32 or bf16; may be the student's z, but no other view of the logits' memory
    *,
    divergence: str = "reverse_kl",
    parameter: float = 0.0,
    gate: str = "kl",
    all_statistics: bool = True,
    scratch: Tensor | None = None,  # the reference's; unused
    gather: Gather = None,
    first_column: int = 0,
    difference: bool = False,
    splits: int | None = None,
) -> None:
    """Arguments as in `reference.divergences.divergence_rows`; splits as in `split_blocks`. The logits survive unless
    the gradient is the student's z. Two gathers, for the gate "tv" three; scratch is 12 floats per row and split.

    difference: the sides are those of `reference.differences.difference_rows`; the gradient may be the student's z seen
    as bf16.
    """
    row = row_of(divergence, parameter, gate)
    pair = Pair.of(student, teacher, difference)
    n, columns = student.z.shape
    if n == 0:
        return
    block, warps = launch_shape("divergence_rows", columns)
    splits, blocks = split_blocks(n, columns, block, splits)
    tuning = {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}

    grid, planes = (n, splits), len(NORMALISERS) if row.infinite else 4
    pieces = statistics.new_empty(splits, planes, n)
    _normaliser_kernel[grid](
        *pair.pointers, *pair.factors, pieces, *pair.strides, n, columns, blocks, *pair.transforms,
        DIFFERENCE=difference, DIVERGENCE=row.code, PLANES=planes, **pair.options, **tuning,
    )  # fmt: skip
    if gather is not None:
        pieces = gather(merge_normalisers(pieces))
    variation = None
    if "gate" in row.parameters and gate == "tv":
        variation = total_variation(pair, pieces, columns, splits, blocks, tuning)
        if gather is not None:
            variation = gather(variation.sum(0, keepdim=True)).squeeze(1)
    options = merging(pieces, row.code, difference, variation)

    def launch(terms: Tensor, written: Tensor | None, with_terms: bool) -> None:
        _terms_kernel[grid](
            *pair.pointers, *pair.factors, row_weights, pieces, pieces if variation is None else variation, terms,
            student.z if written is None else written, *pair.strides, 0 if written is None else written.stride(0),
            n, columns, len(pieces), blocks, first_column, *pair.transforms, student.derivative, parameter,
            1.0 - parameter, TERMS=len(TERMS), WRITE_TERMS=with_terms,
            WRITE_MOMENT=with_terms and gradient is not None and not row.two_passes,
            WRITE_GRADIENT=written is not None, ALL_STATISTICS=all_statistics and with_terms,
            maxnreg=MOST_REGISTERS, **pair.options, **options, **tuning,
        )  # fmt: skip

    terms = statistics.new_empty(splits, len(TERMS), n)
    launch(terms, gradient if row.two_passes else None, True)
    if gather is not None:
        terms = gather(merge_terms(terms))
    if gradient is not None and not row.two_passes:
        launch(terms, gradient, False)
    write_statistics(statistics, pieces, variation, terms, all_statistics, options)

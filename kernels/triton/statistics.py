"""What all pieces of a row say together, for kernels that see one of them each (Triton).

The twin of `reference.statistics`. A piece is what one program saw of a row, or one rank's slice of a sharded head.
Every program merges the few numbers of its row by itself, in one order, so two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from opcd_fast.kernels.reference import DIVERGENCES, FARTHEST
from opcd_fast.kernels.triton.logits import SMALLEST, expm1

PROGRAMS = 256  # that keep a large device busy: two on each of 128 multiprocessors

REVERSE_KL = tl.constexpr(DIVERGENCES["reverse_kl"].code)
FORWARD_KL = tl.constexpr(DIVERGENCES["forward_kl"].code)
GATED_KL = tl.constexpr(DIVERGENCES["gated_kl"].code)
_FARTHEST = tl.constexpr(FARTHEST)


def padded(pieces: int) -> int:
    """PIECES of a kernel for so many: one of two sizes, so that other numbers of rows compile nothing anew."""
    return 1 if pieces == 1 else max(PROGRAMS, triton.next_power_of_2(pieces))


def merging(pieces: Tensor, divergence: int | None, difference: bool, variation: Tensor | None) -> dict[str, Any]:
    """Options of a kernel that calls `known_of`. divergence: its code. pieces: (pieces, planes, n);
    variation: (pieces, n)."""
    return {
        "DIVERGENCE": divergence, "DIFFERENCE": difference, "VARIATION": variation is not None,
        "PLANES": pieces.shape[1], "PIECES": padded(len(pieces)),
    }  # fmt: skip


@triton.jit
def pieces_of(ptr, row, n_rows, n_pieces, PLANES, PIECES):
    """The first plane of a row's pieces, and which of them there are."""
    pieces = tl.arange(0, PIECES)
    return ptr + row + pieces.to(tl.int64) * PLANES * n_rows, pieces < n_pieces


@triton.jit
def merged(place, there, n_rows):
    """Of one side: its maximum, its logsumexp, its sum of exponentials, and what scales a piece's sums to that."""
    m = tl.load(place, mask=there, other=float("-inf"))
    top = tl.max(m, 0)
    scale = tl.exp(m - top)
    total = tl.sum(tl.load(place + n_rows, mask=there, other=0.0) * scale, 0)
    return top, top + tl.log(total), total, scale


@triton.jit
def known_of(
    pieces_ptr, variation_ptr, row, n_rows, n_pieces,
    DIVERGENCE: tl.constexpr, DIFFERENCE: tl.constexpr, VARIATION: tl.constexpr, PLANES: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """What is known of a row after its first pass: maxima and logsumexps of both sides; lse_s - lse_t without the
    rounding of either; E_p[z_s - z_t], by which the reverse KL's gradient is shifted; the gate and 1 - gate. The last
    is 0, inf for a row whose value is infinite, or NaN for one that differences do not do for."""
    place, there = pieces_of(pieces_ptr, row, n_rows, n_pieces, PLANES, PIECES)
    m_s, lse_s, total_s, scale = merged(place, there, n_rows)
    m_t, lse_t, total_t, _ = merged(place + 2 * n_rows, there, n_rows)
    # A difference of two logsumexps errs by their rounding, which is 1e-6 where they are around 10.
    log_ratio = (m_s - m_t) + tl.log(total_s / total_t)
    known = log_ratio
    shift = 0.0
    gate = 0.0
    rest = 1.0
    verdict = 0.0
    if PLANES > 4:
        shift = tl.sum(tl.load(place + 4 * n_rows, mask=there, other=0.0) * scale, 0) / total_s
        known += shift
        largest = tl.max(tl.load(place + 5 * n_rows, mask=there, other=float("-inf")), 0)
        by_teacher = tl.exp(largest - lse_s) >= SMALLEST
        largest = tl.max(tl.load(place + 6 * n_rows, mask=there, other=float("-inf")), 0)
        by_student = tl.exp(largest - lse_t) >= SMALLEST
        if DIVERGENCE == REVERSE_KL:
            verdict = tl.where(by_teacher, float("inf"), 0.0)
        else:
            verdict = tl.where(by_student, float("inf"), 0.0)
    if DIVERGENCE == GATED_KL:
        if VARIATION:
            place, there = pieces_of(variation_ptr, row, n_rows, n_pieces, 1, PIECES)
            gate = tl.sum(tl.load(place, mask=there, other=0.0), 0)
            gate = tl.where(by_teacher | (gate > 1.0), 1.0, gate)
            rest = 1.0 - gate
        else:
            # Rounding leaves the KL below 0 at times; NaN stays.
            distance = shift - log_ratio
            distance = tl.where(distance < 0.0, 0.0, distance)
            distance = tl.where(by_teacher, float("inf"), distance)
            gate = -expm1(-distance)
            rest = tl.exp(-distance)
        # Closed, the gate keeps out whatever the reverse KL is.
        shift = tl.where(rest == 0.0, 0.0, shift)
    if DIFFERENCE:
        near = (tl.abs(m_s) <= _FARTHEST) & (tl.abs(known) < float("inf"))
        verdict = tl.where(near, verdict, float("nan"))
    return m_s, m_t, lse_s, lse_t, log_ratio, shift, gate, rest, verdict


@triton.jit
def _statistics_kernel(
    pieces_ptr, variation_ptr, terms_ptr, statistics_ptr, stride_statistics, n_rows, n_pieces,
    DIVERGENCE: tl.constexpr, DIFFERENCE: tl.constexpr, VARIATION: tl.constexpr, PLANES: tl.constexpr,
    PIECES: tl.constexpr, TERMS: tl.constexpr, ALL_STATISTICS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _, _, lse_s, lse_t, _, _, gate, _, verdict = known_of(
        pieces_ptr, variation_ptr, row, n_rows, n_pieces, DIVERGENCE, DIFFERENCE, VARIATION, PLANES, PIECES
    )
    place, there = pieces_of(terms_ptr, row, n_rows, n_pieces, TERMS, PIECES)
    value = tl.sum(tl.load(place, mask=there, other=0.0), 0)
    value = tl.where(value < 0.0, 0.0, value)
    statistics_ptr += row
    tl.store(statistics_ptr, tl.where(verdict == 0.0, value, verdict))
    if ALL_STATISTICS:
        entropy = -tl.sum(tl.load(place + n_rows, mask=there, other=0.0), 0)
        top_s = tl.min(tl.load(place + 2 * n_rows, mask=there, other=float("inf")), 0)
        top_t = tl.min(tl.load(place + 3 * n_rows, mask=there, other=float("inf")), 0)
        tl.store(statistics_ptr + stride_statistics, entropy)
        tl.store(statistics_ptr + 2 * stride_statistics, lse_s)
        tl.store(statistics_ptr + 3 * stride_statistics, lse_t)
        tl.store(statistics_ptr + 4 * stride_statistics, (top_s == top_t).to(tl.float32))
        if DIVERGENCE == GATED_KL:
            tl.store(statistics_ptr + 5 * stride_statistics, gate)


def write_statistics(
    statistics: Tensor,  # (6, n) written, all planes or the first alone
    pieces: Tensor,  # (pieces, planes, n) of the first pass, planes as in NORMALISERS
    variation: Tensor | None,  # (pieces, n)
    terms: Tensor,  # (pieces, 5, n), planes as in TERMS
    all_statistics: bool,
    options: dict[str, Any],  # `merging`
) -> None:
    _statistics_kernel[(pieces.shape[2],)](
        pieces, pieces if variation is None else variation, terms, statistics, statistics.stride(0), pieces.shape[2],
        len(pieces), TERMS=terms.shape[1], ALL_STATISTICS=all_statistics, num_warps=1, **options,
    )  # fmt: skip

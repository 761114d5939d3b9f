"""What is known of a row of logits, and how what pieces of a vocabulary say becomes what the whole vocabulary says.

A piece is what one program saw of a row, or one rank's slice of a sharded head. All tensors here are a few floats
per row; pieces are summed in their order, so two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# (planes, n) of this rank -> (ranks, planes, n) of all of them, in rank order
Gather = Callable[[Tensor], Tensor] | None

# The planes of the statistics tensor, in order. One float per row each; "gate" is left as it is where there is none.
STATISTICS = ("token_kl", "student_entropy", "student_logsumexp", "teacher_logsumexp", "top1_agreement", "gate")
# Planes of a piece's first pass. The last three are left out where nobody needs them.
NORMALISERS = ("max_s", "sum_s", "max_t", "sum_t", "difference", "forbidden_s", "forbidden_t")
# Planes of a piece's second pass.
TERMS = ("value", "negative_entropy", "top_s", "top_t", "moment")


FARTHEST = 8.0  # from 0 may a row's largest logit lie in float16, which is then within 0.002 of what was rounded


class Rows(NamedTuple):
    """What the passes after the first know of each row, (n,) each."""

    max_s: Tensor
    max_t: Tensor
    lse_s: Tensor
    lse_t: Tensor
    log_ratio: Tensor  # lse_s - lse_t without the rounding of either

    def part(self, rows: slice) -> Rows:
        return Rows(*(plane[rows] for plane in self))


def merge_normalisers(pieces: Tensor) -> Tensor:
    """(pieces, planes, n) -> (planes, n), planes as in NORMALISERS.

    sum is sum exp(z - max) over the piece, difference the same sum weighted with z_s - z_t (on exp(z_s - max_s)),
    forbidden_s the student's largest logit of a token that the teacher forbids. A piece without a finite logit has max
    -inf (or less than any logit) and sum 0.
    """
    if len(pieces) == 1:
        return pieces[0]
    max_s, sum_s, max_t, sum_t, *rest = pieces.unbind(1)
    top_s, scale_s = _common_scale(max_s)
    top_t, scale_t = _common_scale(max_t)
    merged = [top_s, (sum_s * scale_s).sum(0), top_t, (sum_t * scale_t).sum(0)]
    if rest:
        merged += [(rest[0] * scale_s).sum(0), *(forbidden.amax(0) for forbidden in rest[1:])]
    return torch.stack(merged)


def _common_scale(maxima: Tensor) -> tuple[Tensor, Tensor]:
    top = maxima.amax(0)
    return top, torch.exp(maxima - top.masked_fill(top == float("-inf"), 0.0))


def normalise(merged: Tensor) -> Rows:
    """Logsumexps of the first four of merged NORMALISERS."""
    max_s, sum_s, max_t, sum_t = merged[:4].unbind(0)
    return Rows(
        max_s,
        max_t,
        max_s + sum_s.log(),
        max_t + sum_t.log(),
        # A difference of two logsumexps errs by their rounding, which is 1e-6 where they are around 10. The
        # gradient at a KL of 1e-6 is made of l around 1e-3.
        (max_s - max_t) + torch.log(sum_s / sum_t),
    )


def merge_terms(pieces: Tensor) -> Tensor:
    """(pieces, planes, n) -> (planes, n), planes as in TERMS: sums, but for the column numbers top_s and top_t.

    Those are the lowest column at which a piece reaches the row's maximum, inf where it does not. Column numbers are
    exact below 2^24 in float32.
    """
    if len(pieces) == 1:
        return pieces[0]
    merged = pieces.sum(0)
    merged[2:4] = pieces[:, 2:4].amin(0)
    return merged


def write_statistics(
    statistics: Tensor,  # (6, n) written; see STATISTICS
    rows: Rows,
    terms: Tensor,  # merged TERMS
    all_statistics: bool,
    gate: Tensor | None = None,  # (n,)
) -> None:
    """The planes of STATISTICS from what all pieces together say."""
    statistics[0] = terms[0].clamp(min=0.0)
    if all_statistics:
        statistics[1] = -terms[1]
        statistics[2] = rows.lse_s
        statistics[3] = rows.lse_t
        statistics[4] = terms[2] == terms[3]
        if gate is not None:
            statistics[5] = gate


def gate_from(total: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """The gate w and 1 - w of `gated_kl`, (n,) each, from KL(p || q) ("kl") or the total variation ("tv"), (n,).

    Infinite where the teacher forbids what the student may say; the gate is 1 there.
    """
    if gate == "tv":
        w = total.clamp(0.0, 1.0)
        return w, 1.0 - w
    minus = -total.clamp(min=0.0)
    return -torch.expm1(minus), torch.exp(minus)

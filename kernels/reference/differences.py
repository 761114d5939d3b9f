"""The row operation of every divergence from a student's logits and their differences to its teacher's, in float16.

With the head W that both share, y a token near the largest logit of the row (the one that was drawn), and a power of
two a row that is undone here:

    z'_v = (h_s W^T)_v - (h_s W^T)_y          d'_v = ((h_s - h_t) W^T)_v - ((h_s - h_t) W^T)_y

Both are products that were rounded once, to 11 bits. A divergence and its gradient do not change when a row of logits
moves by a constant, so p = softmax(z'), q is proportional to p exp(-d'), and log(p / q) = d' + log E_p[exp(-d')] loses
a share of itself, however small it is. Rounding z' moves p and q alike, by a share of each that is small where z' is:
it has to be near 0 where p is large. Rows in which it is not are marked for the caller.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opcd_fast.kernels.reference import divergences
from opcd_fast.kernels.reference.logits import Logits, column
from opcd_fast.kernels.reference.statistics import FARTHEST, Gather


def difference_rows(
    student: Logits,  # z' (n, V) float16, with factors; without bias and softcap
    difference: Logits,  # d' (n, V) likewise, with the same scale and temperature
    row_weights: Tensor,  # (n,) float32
    statistics: Tensor,  # (6, n) float32
    gradient: Tensor | None,  # (n, V) of any type; may be z' itself, seen as bf16
    *,
    gather: Gather = None,
    **options: Any,
) -> None:
    """`divergence_rows` with the logits z' and z' - d', in float64: the rounding of z' and d' is all that is left.

    options: those of `divergence_rows`, scratch in float64. The logsumexps written are those of z' and z' - d', so
    the caller adds what was subtracted.

    A row whose largest logit is farther than 8 from 0, or in which something is not finite, has NaN for its value and
    gradient 0: it is to be computed from logits in 32 bits.
    """
    assert student.factors is not None and difference.factors is not None
    z, d = student.z.double(), difference.z.double()
    z.mul_(column(student.factors)).mul_(student.derivative)
    d.mul_(column(difference.factors)).mul_(difference.derivative)
    top = z.amax(-1)
    if gather is not None:
        top = gather(top.unsqueeze(0)).amax(0)[0]
    found, g = statistics.new_zeros(statistics.shape, dtype=torch.float64), None if gradient is None else z
    weights = row_weights.double() * student.derivative
    divergences.divergence_rows(Logits(z), Logits(z - d), weights, found, g, gather=gather, **options)
    found[0].masked_fill_(~((top.abs() <= FARTHEST) & found[0].isfinite()), float("nan"))
    statistics.copy_(found)
    if gradient is not None:
        gradient.copy_(z.masked_fill_(column(found[0].isnan()), 0.0))

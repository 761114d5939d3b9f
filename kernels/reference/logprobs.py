"""The row operation of one token's log-probability in plain PyTorch.

For one row of logits z (already divided by the temperature) with p its softmax, and one token:

    log p(token) = z[token] - logsumexp(z)        d log p(token) / dz_v = 1[v = token] - p_v
"""

from __future__ import annotations

import torch
from torch import Tensor

from opcd_fast.kernels.reference.logits import Logits, column

# The planes of the statistics tensor, in order. One float per row each.
STATISTICS = ("logprob", "entropy")


def scratch_planes(softcap: float | None) -> int:
    """How many (block, V) buffers `logprob_rows` needs beside its input."""
    return 2 if softcap is None else 3


def logprob_rows(
    logits: Logits,  # z (n, V) float32 or float64; destroyed
    token_ids: Tensor,  # (n,) int64, each in 0..V-1
    row_weights: Tensor,  # (n,) multiplied into the gradient, not into the statistics
    statistics: Tensor,  # (2, n) written; see STATISTICS
    gradient: Tensor | None,  # (n, V) written; may be z itself. None: statistics only
    *,
    scratch: Tensor | None = None,  # (scratch_planes(logits.softcap), block, V) same dtype as z; None: its own
) -> None:
    """Write log p(token) and the entropy of n rows, and d(sum_n w_n log p_n)/d(raw product) into `gradient`.

    A token of probability 0 (logit -inf) has log-probability -inf, and its row the gradient 0. NaN inputs give NaN
    outputs.
    """
    if len(logits.z) == 0:
        return
    scratch, blocks = logits.blocks(scratch, scratch_planes(logits.softcap))
    for rows in blocks:
        log_p, p, *slope_plane = scratch[:, : rows.stop - rows.start].unbind(0)
        block = logits.rows(rows)
        z = block.transform_()
        slope = block.slope(slope_plane, gradient is not None)
        torch.log_softmax(z, -1, out=log_p)
        torch.exp(log_p, out=p)
        chosen = column(token_ids[rows])
        logprob = log_p.gather(-1, chosen).squeeze(-1)
        statistics[0, rows] = logprob
        # p log p is 0, not a NaN, where p is 0.
        statistics[1, rows] = -log_p.clamp_(min=torch.finfo(p.dtype).min).mul_(p).sum(-1)
        if gradient is None:
            continue
        g = p.neg_().scatter_add_(-1, chosen, torch.ones_like(column(logprob)))
        g.mul_(column(row_weights[rows] * logits.derivative))
        if slope is not None:
            g.mul_(slope)
        gradient[rows] = g.masked_fill_(column(logprob == float("-inf")), 0.0)

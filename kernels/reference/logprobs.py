"""The row operation of one token's log-probability in plain PyTorch.

For one row of logits z (already divided by the temperature) with p its softmax, and one token:

    log p(token) = z[token] - logsumexp(z)        d log p(token) / dz_v = 1[v = token] - p_v
"""

from __future__ import annotations

import torch
from torch import Tensor

from opcd_fast.kernels.reference.reverse_kl import transform_logits

# The planes of the statistics tensor, in order. One float per row each.
STATISTICS = ("logprob", "entropy")
OWN_SCRATCH = 1 << 24  # bytes of each scratch plane where the caller brings none


def scratch_planes(softcap: float | None) -> int:
    """How many (block, V) buffers `logprob_rows` needs beside its input."""
    return 2 if softcap is None else 3


def logprob_rows(
    z: Tensor,  # (n, V) raw products h @ W.T, float32 or float64; destroyed
    bias: Tensor | None,  # (V,)
    token_ids: Tensor,  # (n,) int64, each in 0..V-1
    row_weights: Tensor,  # (n,) multiplied into the gradient, not into the statistics
    statistics: Tensor,  # (2, n) written; see STATISTICS
    gradient: Tensor | None,  # (n, V) written; may be z itself. None: statistics only
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
    scratch: Tensor | None = None,  # (scratch_planes(softcap), block, V) same dtype as z; None: its own
) -> None:
    """Write log p(token) and the entropy of n rows, and d(sum_n w_n log p_n)/d(raw product) into `gradient`.

    The model's logits are softcap(scale * (z + bias)); the gradient carries the derivatives of softcap, scale and
    1/temperature. A token of probability 0 (logit -inf) has log-probability -inf, and its row the gradient 0. NaN
    inputs give NaN outputs.
    """
    if len(z) == 0:
        return
    if scratch is None:
        block = max(1, OWN_SCRATCH // (z.shape[1] * z.element_size()))
        scratch = z.new_empty(scratch_planes(softcap), min(block, len(z)), z.shape[1])
    for start in range(0, len(z), scratch.shape[1]):
        rows = slice(start, min(start + scratch.shape[1], len(z)))
        log_p, p, *slope_plane = scratch[:, : rows.stop - start].unbind(0)
        logits = z[rows]
        factor = transform_logits(logits, bias, scale, softcap, temperature)
        slope: Tensor | None = None
        if softcap is not None and gradient is not None:
            # d softcap(u)/du = 1 - tanh(u/softcap)^2, and tanh(u/softcap) = z * temperature / softcap
            slope = torch.mul(logits, temperature / softcap, out=slope_plane[0]).square_().neg_().add_(1.0)
        torch.log_softmax(logits, -1, out=log_p)
        torch.exp(log_p, out=p)
        chosen = token_ids[rows].unsqueeze(-1)
        logprob = log_p.gather(-1, chosen).squeeze(-1)
        statistics[0, rows] = logprob
        # p log p is 0, not a NaN, where p is 0.
        statistics[1, rows] = -log_p.clamp_(min=torch.finfo(p.dtype).min).mul_(p).sum(-1)
        if gradient is None:
            continue
        g = p.neg_().scatter_add_(-1, chosen, torch.ones_like(logprob).unsqueeze(-1))
        g.mul_((row_weights[rows] * factor).unsqueeze(-1))
        if slope is not None:
            g.mul_(slope)
        impossible = (logprob == float("-inf")).unsqueeze(-1)
        gradient[rows] = g.masked_fill_(impossible, 0.0)

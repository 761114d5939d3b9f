"""The reverse KL cut to the student's k most likely tokens, from two rows of logits, in plain PyTorch.

With S the student's top k, p and q normalised over the whole vocabulary, l = log p - log q, P and Q the masses of S:

    none         sum_S p l                                     what the OPCD authors' code minimises (k = 256)
    renormalize  KL(p / P || q / Q) on S
    bucket       sum_S p l + (1 - P) log((1 - P) / (1 - Q))    the rest is one more token

Which tokens are in S is a constant of the gradient. "none" is no divergence: it can be negative, and its gradient
at p = q is not 0 unless S is everything. It exists to reproduce published runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opcd_fast.kernels.reference.logits import Logits, column


def scratch_planes(softcap_s: float | None) -> int:
    """How many (block, V) buffers `topk_reverse_kl_rows` needs beside its inputs."""
    return 3 if softcap_s is None else 4


def topk_reverse_kl_rows(
    student: Logits,
    teacher: Logits,
    row_weights: Tensor,
    statistics: Tensor,
    gradient: Tensor | None,
    *,
    k: int,
    tail: str,
    all_statistics: bool = True,
    scratch: Tensor | None = None,  # (scratch_planes(student.softcap), block, V)
) -> None:
    """Statistics of n rows and d(sum_n w_n D_n)/d(raw student product); conventions of `divergence_rows`."""
    scratch, blocks = student.blocks(scratch, scratch_planes(student.softcap))
    for rows in blocks:
        log_p, p, q, *slope_plane = scratch[:, : rows.stop - rows.start].unbind(0)
        block = student.rows(rows)
        z_s, z_t = block.transform_(), teacher.rows(rows).transform_()
        slope = block.slope(slope_plane, gradient is not None)
        top, chosen = z_s.topk(min(k, z_s.shape[1]), dim=-1)
        theirs = z_t.gather(-1, chosen)
        torch.log_softmax(z_s, -1, out=log_p)
        torch.exp(log_p, out=p)
        if all_statistics:
            statistics[4, rows] = z_s.argmax(-1) == z_t.argmax(-1)
        log_q = torch.log_softmax(z_t, -1, out=z_s)
        if all_statistics or tail != "renormalize":
            lse_s, lse_t = top[:, 0] - log_p.amax(-1), z_t.amax(-1) - log_q.amax(-1)
        if all_statistics:
            statistics[2, rows], statistics[3, rows] = lse_s, lse_t
            finite = torch.where(p > 0, log_p, 0.0)
            statistics[1, rows] = -(finite * p).sum(-1)
        if tail == "renormalize":
            lse_s, lse_t = top.logsumexp(-1), theirs.logsumexp(-1)
        # Not log p - log q, whose difference has lost its digits near p = q; those of logsumexps move all of l alike.
        # A teacher that forbids them all has nothing to normalise, and the row is infinite.
        l = top - theirs - column(lse_s - lse_t.masked_fill(lse_t == float("-inf"), 0.0))
        value, inside, outside = _truncated(log_p, p, log_q, q, l, chosen, tail)
        statistics[0, rows] = value
        if gradient is None:
            continue
        # inside: G of the chosen tokens; outside: what multiplies p for all others.
        g = p.mul_(column(outside)).scatter_(-1, chosen, inside)
        g.mul_(column(row_weights[rows] * student.derivative))
        if slope is not None:
            g.mul_(slope)
        gradient[rows] = g.masked_fill_(column(value == float("inf")), 0.0).to(gradient.dtype)


def _truncated(
    log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, l: Tensor, chosen: Tensor, tail: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(value (n,), gradient of the chosen (n, k), factor of p elsewhere (n,)) before row weights. l: of the
    chosen; q is scratch."""
    tiny = torch.finfo(p.dtype).tiny
    log_p_k, log_q_k = log_p.gather(-1, chosen), log_q.gather(-1, chosen)
    if tail == "renormalize":
        log_p_k = log_p_k - log_p_k.logsumexp(-1, keepdim=True)
        mass = log_q_k.logsumexp(-1, keepdim=True)
        log_q_k = log_q_k - mass.masked_fill(mass == float("-inf"), 0.0)
    p_k = log_p_k.exp()
    reached = ~(p_k < tiny)
    l = torch.where(reached, l, 0.0)
    p_k = torch.where(reached, p_k, 0.0)
    if tail == "none":
        value = (p_k * l).sum(-1)
        center = value + p_k.sum(-1)
        return value, p_k * (l + 1.0 - column(center)), -center
    # Every term >= 0: q - p + p l = p (expm1(-l) + l).
    terms = torch.where(reached, p_k * (torch.expm1(-l) + l), log_q_k.exp()).sum(-1)
    center = (p_k * l).sum(-1)
    if tail == "renormalize":
        return terms, p_k * (l - column(center)), torch.zeros_like(center)
    # The rest's masses as sums of their own: 1 - P would have lost them.
    rest_p = p.scatter(-1, chosen, 0.0).sum(-1)
    rest_q = torch.exp(log_q, out=q).scatter_(-1, chosen, 0.0).sum(-1)
    exists = ~(rest_p < tiny)
    l_rest = torch.where(exists, rest_p.log() - rest_q.log(), 0.0)
    rest_term = torch.where(exists, rest_p * (torch.expm1(-l_rest) + l_rest), rest_q)
    center = center + torch.where(exists, rest_p * l_rest, 0.0)
    return terms + rest_term, p_k * (l - column(center)), l_rest - center

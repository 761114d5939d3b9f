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

from opcd_fast.kernels.reference.reverse_kl import transform_logits


def scratch_planes(softcap_s: float | None) -> int:
    """How many (block, V) buffers `topk_reverse_kl_rows` needs beside its inputs."""
    return 3 if softcap_s is None else 4


def topk_reverse_kl_rows(
    z_s: Tensor,  # (n, V) raw products, float32 or float64; destroyed
    z_t: Tensor,  # (n, V) same dtype; destroyed
    bias_s: Tensor | None,  # (V,)
    bias_t: Tensor | None,
    row_weights: Tensor,  # (n,)
    statistics: Tensor,  # (5, n) written; see reference.STATISTICS, plane 0 is the truncated divergence
    gradient: Tensor | None,  # (n, V); may be z_s
    *,
    k: int,
    tail: str,
    scale_s: float,
    scale_t: float,
    softcap_s: float | None,
    softcap_t: float | None,
    temperature: float,
    all_statistics: bool,
    scratch: Tensor,  # (scratch_planes(softcap_s), block, V) same dtype as z_s
) -> None:
    """Statistics of n rows and d(sum_n w_n D_n)/d(raw student product); conventions of `reference.reverse_kl_rows`."""
    for start in range(0, z_s.shape[0], scratch.shape[1]):
        rows = slice(start, min(start + scratch.shape[1], z_s.shape[0]))
        log_p, p, q, *slope_plane = scratch[:, : rows.stop - start].unbind(0)
        student, teacher = z_s[rows], z_t[rows]
        factor = transform_logits(student, bias_s, scale_s, softcap_s, temperature)
        transform_logits(teacher, bias_t, scale_t, softcap_t, temperature)
        slope: Tensor | None = None
        if softcap_s is not None and gradient is not None:
            slope = torch.mul(student, temperature / softcap_s, out=slope_plane[0]).square_().neg_().add_(1.0)
        top, chosen = student.topk(min(k, student.shape[1]), dim=-1)
        torch.log_softmax(student, -1, out=log_p)
        torch.exp(log_p, out=p)
        if all_statistics:
            statistics[2, rows] = top[:, 0] - log_p.amax(-1)
            teacher_max = teacher.amax(-1)
            statistics[4, rows] = student.argmax(-1) == teacher.argmax(-1)
        log_q = torch.log_softmax(teacher, -1, out=student)
        if all_statistics:
            statistics[3, rows] = teacher_max - log_q.amax(-1)
            finite = torch.where(p > 0, log_p, 0.0)
            statistics[1, rows] = -(finite * p).sum(-1)
        value, inside, outside = _truncated(log_p, p, log_q, q, chosen, tail)
        statistics[0, rows] = value
        if gradient is None:
            continue
        # inside: G of the chosen tokens; outside: what multiplies p for all others.
        g = p.mul_(outside.unsqueeze(-1)).scatter_(-1, chosen, inside)
        g.mul_((row_weights[rows] * factor).unsqueeze(-1))
        if slope is not None:
            g.mul_(slope)
        gradient[rows] = g.masked_fill_((value == float("inf")).unsqueeze(-1), 0.0).to(gradient.dtype)


def _truncated(
    log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, chosen: Tensor, tail: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(value (n,), gradient of the chosen (n, k), factor of p elsewhere (n,)) before row weights. q is scratch."""
    tiny = torch.finfo(p.dtype).tiny
    log_p_k, log_q_k = log_p.gather(-1, chosen), log_q.gather(-1, chosen)
    if tail == "renormalize":
        log_p_k = log_p_k - log_p_k.logsumexp(-1, keepdim=True)
        mass = log_q_k.logsumexp(-1, keepdim=True)
        # A teacher that forbids them all has nothing to normalise, and the row is infinite.
        log_q_k = log_q_k - mass.masked_fill(mass == float("-inf"), 0.0)
    p_k = log_p_k.exp()
    reached = ~(p_k < tiny)
    l = torch.where(reached, log_p_k - log_q_k, 0.0)
    p_k = torch.where(reached, p_k, 0.0)
    if tail == "none":
        value = (p_k * l).sum(-1)
        center = value + p_k.sum(-1)
        return value, p_k * (l + 1.0 - center.unsqueeze(-1)), -center
    # Every term >= 0, as in the reference: q - p + p l = p (expm1(-l) + l).
    terms = torch.where(reached, p_k * (torch.expm1(-l) + l), log_q_k.exp()).sum(-1)
    center = (p_k * l).sum(-1)
    if tail == "renormalize":
        return terms, p_k * (l - center.unsqueeze(-1)), torch.zeros_like(center)
    # The rest's masses as sums of their own: 1 - P would have lost them.
    rest_p = p.scatter(-1, chosen, 0.0).sum(-1)
    rest_q = torch.exp(log_q, out=q).scatter_(-1, chosen, 0.0).sum(-1)
    exists = ~(rest_p < tiny)
    l_rest = torch.where(exists, rest_p.log() - rest_q.log(), 0.0)
    rest_term = torch.where(exists, rest_p * (torch.expm1(-l_rest) + l_rest), rest_q)
    center = center + torch.where(exists, rest_p * l_rest, 0.0)
    return terms + rest_term, p_k * (l - center.unsqueeze(-1)), l_rest - center

"""The row operation of the reverse KL in plain PyTorch: the executable specification of every other kernel.

For one row with student logits z_s and teacher logits z_t (both already divided by the temperature), p and q
their softmaxes and l = log p - log q:

    KL(p || q) = sum_v p l           dKL/dz_s = p (l - KL)

Both are exact identities, but neither is safe in 32-bit arithmetic when p is close to q, which is where
distillation ends up: the terms of sum p l are a thousand times larger than their sum. Since p and q each sum
to one, sum_v (q - p + p l) is the same number with every term >= 0, and q - p + p l = p (expm1(-l) + l).
Where p underflows, the term that remains is q.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The planes of the statistics tensor, in order. One float per row each.
STATISTICS = ("token_kl", "student_entropy", "student_logsumexp", "teacher_logsumexp", "top1_agreement")


def scratch_planes(softcap_s: float | None) -> int:
    """How many (block, V) buffers `reverse_kl_rows` needs beside its inputs."""
    return 3 if softcap_s is None else 4


def reverse_kl_rows(
    z_s: Tensor,  # (n, V) raw products h_s @ W_s.T, float32 or float64; destroyed
    z_t: Tensor,  # (n, V) the teacher's, same dtype; destroyed
    bias_s: Tensor | None,  # (V,)
    bias_t: Tensor | None,  # (V,)
    row_weights: Tensor,  # (n,) multiplied into the gradient, not into the statistics
    statistics: Tensor,  # (5, n) written; see STATISTICS
    gradient: Tensor | None,  # (n, V) written; may be z_s itself. None: statistics only
    *,
    scale_s: float,
    scale_t: float,
    softcap_s: float | None,
    softcap_t: float | None,
    temperature: float,
    all_statistics: bool,
    scratch: Tensor,  # (scratch_planes(softcap_s), block, V) same dtype as z_s
) -> None:
    """Write the statistics of n rows and d(sum_n w_n KL_n)/d(raw student product) into `gradient`.

    The model's logits are softcap(scale * (z + bias)); the gradient is with respect to z, so it carries the
    derivatives of softcap, scale and 1/temperature. Without `all_statistics` only plane 0 (the KL) is
    written.

    A row in which the teacher gives probability 0 to a token the student may choose has KL = inf; its
    gradient is 0. NaN inputs give NaN outputs.

    Works through blocks of `scratch.shape[1]` rows so that, on a CPU, a block stays in cache between the
    passes below; all of them write into buffers that exist already.
    """
    for start in range(0, z_s.shape[0], scratch.shape[1]):
        rows = slice(start, min(start + scratch.shape[1], z_s.shape[0]))
        _one_block(
            z_s[rows],
            z_t[rows],
            bias_s,
            bias_t,
            row_weights[rows],
            statistics[:, rows],
            None if gradient is None else gradient[rows],
            (scale_s, scale_t, softcap_s, softcap_t, temperature),
            all_statistics,
            scratch[:, : rows.stop - start],
        )


def transform_logits(z: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float) -> float:
    """Turn raw products into logits / temperature in place; return the constant factor of the derivative."""
    if bias is not None:
        z.add_(bias)
    if softcap is None:
        factor = scale / temperature
        if factor != 1.0:
            z.mul_(factor)
        return factor
    z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
    return scale / temperature


def _row_dot(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mul(a, b, out=out).sum(dim=-1)


def _one_block(
    z_s: Tensor,
    z_t: Tensor,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    row_weights: Tensor,
    statistics: Tensor,
    gradient: Tensor | None,
    transform: tuple[float, float, float | None, float | None, float],
    all_statistics: bool,
    scratch: Tensor,
) -> None:
    scale_s, scale_t, softcap_s, softcap_t, temperature = transform
    log_p, p, product, *slope_plane = scratch.unbind(0)
    slope: Tensor | None = None
    factor = transform_logits(z_s, bias_s, scale_s, softcap_s, temperature)
    transform_logits(z_t, bias_t, scale_t, softcap_t, temperature)
    if softcap_s is not None and gradient is not None:
        # d softcap(u)/du = 1 - tanh(u/softcap)^2, and tanh(u/softcap) = z * temperature / softcap
        slope = torch.mul(z_s, temperature / softcap_s, out=slope_plane[0])
        slope.square_().neg_().add_(1.0)

    torch.log_softmax(z_s, -1, out=log_p)
    if all_statistics:
        # max(z) - max(log p) instead of a second logsumexp pass; both maxima are the same column.
        torch.sub(z_s.amax(-1), log_p.amax(-1), out=statistics[2])
        teacher_max = z_t.amax(-1)
        statistics[4] = z_s.argmax(-1) == z_t.argmax(-1)
    log_q = torch.log_softmax(z_t, -1, out=z_s)
    if all_statistics:
        torch.sub(teacher_max, log_q.amax(-1), out=statistics[3])
    l = torch.sub(log_p, log_q, out=z_t)

    # Below the smallest normal number p counts as 0. That keeps expm1(-l) finite wherever p > 0, because
    # l >= log p there. Looking first saves four passes on a CPU; on a device looking would synchronise.
    smallest = torch.finfo(p.dtype).tiny
    unreached: Tensor | None = None
    torch.exp(log_p, out=p)
    if p.is_cuda or not bool(p.amin() >= smallest):  # a NaN in one row must not hide the others
        zero = p < smallest
        p.masked_fill_(zero, 0.0)
        l.masked_fill_(zero, 0.0)
        log_p.masked_fill_(zero, 0.0)
        unreached = torch.exp(log_q, out=product).masked_fill_(zero.logical_not_(), 0.0).sum(dim=-1)

    if all_statistics:
        statistics[1] = -_row_dot(p, log_p, product)
    # Centring with the same l that is centred makes the gradient's row sum vanish whatever the rounding of
    # the two normalisers was.
    center = _row_dot(p, l, product)
    phi = torch.neg(l, out=log_p).expm1_().add_(l)
    kl = _row_dot(p, phi, product).clamp_(min=0.0)
    if unreached is not None:
        kl += unreached
    statistics[0] = kl
    if gradient is None:
        return

    infinite = kl == float("inf")
    g = l.sub_(center.unsqueeze(-1)).mul_((row_weights * factor).unsqueeze(-1))
    if slope is not None:
        g.mul_(slope)
    if g.is_cuda or bool(infinite.any()):
        g.masked_fill_(infinite.unsqueeze(-1), 0.0)
    if gradient.dtype == g.dtype:
        torch.mul(g, p, out=gradient)
    else:
        gradient.copy_(g.mul_(p))

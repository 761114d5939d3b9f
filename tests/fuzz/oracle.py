"""The loss in float64, and by how much arithmetic of another precision may miss it.

The bound is first order, from what the oracle knows: a logit errs by its product, whose D terms are added up one by
one, and by its own rounding; a value errs by its derivative times that, and by the rounding of its terms; G = p (phi -
c) by that of p, phi and c, which is at most that of l. What a sum of V terms can lose beyond is in SLACK.
"""

from dataclasses import dataclass

import torch
from cases import Case
from loss_oracle import divergence64, gate64

from opcd_fast.loss import LMHead

SLACK = 8.0
TINY = float(torch.finfo(torch.float32).tiny)
UNDERFLOWS = TINY * 1e12  # where p does, times the largest phi that alpha >= 1e-12 has
NOISE = 2e-16  # of the oracle's own sums


def precision(*dtypes: torch.dtype) -> float:
    """Of the computation; in float64 the oracle itself is no better than some times that."""
    return 2.0**-44 if torch.float64 in dtypes else 2.0**-24


@dataclass
class Logits:
    z: torch.Tensor  # (n, V) float64, over the temperature
    error: torch.Tensor  # (n, V)
    slope: torch.Tensor  # (n, V) dz / dh @ W.T
    slope_error: torch.Tensor  # (n, V)


def logits(h: torch.Tensor, head: LMHead, temperature: float, eps: float) -> Logits:
    size = head.valid_size
    w = head.weight[:size].double()
    bias = torch.zeros(size, dtype=torch.float64) if head.bias is None else head.bias[:size].double()
    x = h.double() @ w.T + bias
    finite = torch.where(x.isfinite(), x, 0.0)
    error = eps * ((h.shape[-1] + 4) * (h.double().abs() @ w.abs().T) + 4 * finite.abs())
    z, slope, slope_error = head.scale * x, torch.ones_like(x), torch.full_like(x, 8 * eps)
    error = error * abs(head.scale)
    if head.softcap is not None:
        tanh = torch.tanh(z / head.softcap)
        z, slope = tanh * head.softcap, 1 - tanh.square()
        slope_error = slope_error + 4 * error / head.softcap  # of the tanh, whose square is taken from 1
        error = error + 4 * eps * head.softcap
    error = (error + 4 * eps * torch.where(z.isfinite(), z, 0.0).abs()) / temperature
    return Logits(z / temperature, error, slope * head.scale / temperature, slope_error * abs(head.scale) / temperature)


@dataclass
class Exact:
    value: torch.Tensor  # (n,)
    value_error: torch.Tensor  # (n,)
    g: torch.Tensor  # (n, V) d value / d (h @ W.T), 0 where the value is infinite
    g_error: torch.Tensor  # (n, V)
    ambiguous: torch.Tensor  # (n,) bool: rounding decides what is meant, or whether it is infinite


def exact(case: Case, h_s: torch.Tensor, head_s: LMHead, h_t: torch.Tensor, head_t: LMHead) -> Exact:
    """Of the rows (n, D) of both sides, which hold numbers."""
    eps = precision(h_s.dtype, h_t.dtype, head_s.weight.dtype, head_t.weight.dtype)
    s, t = (logits(h, head, case.options["temperature"], eps) for h, head in ((h_s, head_s), (h_t, head_t)))
    name = case.options["divergence"]
    parameters = {key: case.options[key] for key in ("beta", "alpha", "k", "tail", "gate") if key in case.options}
    exists = (s.z > -torch.inf) | (t.z > -torch.inf)
    z_s, z_t = (torch.where(exists, x.z, -1e300).requires_grad_() for x in (s, t))
    value = divergence64(z_s, z_t, name, **parameters)
    finite = value.detach() < torch.inf
    of_s, of_t = (
        torch.where(finite[:, None], x, 0.0).nan_to_num(0.0, 0.0, 0.0)
        for x in torch.autograd.grad(torch.where(finite, value, 0.0).sum(), (z_s, z_t))
    )
    z_s, z_t, value = z_s.detach(), z_t.detach(), value.detach()
    log_p, log_q = z_s.log_softmax(-1), z_t.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    l = (log_p - log_q).abs()
    said = ((p >= TINY) & l.isfinite(), (q >= TINY) & l.isfinite())
    far = sum(torch.where(where, x * l, 0.0).sum(-1) for where, x in zip(said, (p, q)))  # E_p |l| + E_q |l|
    shift = (s.error + t.error).amax(-1)  # of l
    moved = (of_s.abs() * s.error + of_t.abs() * t.error).sum(-1)
    variation = (p - q).abs().sum(-1)
    rounded = eps * (far + variation + value.nan_to_num(0, 0, 0).abs()) + NOISE
    value_error = SLACK * (moved + shift * variation + shift**2 + rounded)
    relative = (shift + eps + NOISE)[:, None]
    # |phi| <= |l|, or p |phi| <= p + q
    g_error = SLACK * (p + q) * (relative * (1 + far[:, None]) + eps * torch.where(l.isfinite(), l, 0.0).clamp(max=100))
    if name == "gated_kl":
        w = gate64(log_p, log_q, case.options["gate"])
        forward, reverse = divergence64(z_s, z_t, "forward_kl"), divergence64(z_s, z_t, "reverse_kl")
        of_gate = SLACK * (relative[:, 0] + eps * far) * (w < 1)
        g_error = g_error + of_gate[:, None] * (p * l.nan_to_num(0, 0, 0) + p + q)
        value_error = value_error + of_gate * (forward - reverse).nan_to_num(0, 0, 0).abs()
    if name == "topk_reverse_kl":  # log p and log q are rounded before their difference is taken
        rounding = SLACK * eps * torch.where(said[0], p * (log_p.abs() + log_q.abs()), 0.0).sum(-1)
        value_error, g_error = value_error + rounding, g_error + rounding[:, None] * p
    g = of_s * s.slope
    g_error = g_error * (s.slope.abs() + s.slope_error) + of_s.abs() * s.slope_error + UNDERFLOWS
    ambiguous = torch.zeros_like(finite)
    # A probability at the end of what float32 holds decides whether a token that the other side forbids counts.
    for z, other, x in ((z_s, t.z, p), (z_t, s.z, q)):
        edge = (other == -torch.inf) & (x > TINY * 1e-3) & (x < TINY * 1e3)
        ambiguous |= edge.any(-1) & (z > -torch.inf).any(-1)
    if name == "topk_reverse_kl":
        k, size = case.options["k"], z_s.shape[-1]
        if k < size:
            top = z_s.topk(k + 1).values
            ambiguous |= top[:, k - 1] - top[:, k] <= 4 * s.error.amax(-1)
        ambiguous |= (~exists).any(-1) | (z_t == -torch.inf).any(-1) | (z_s == -torch.inf).any(-1)
        # The rest's mass is left of a sum, and so is its logarithm.
        rest = 1 - p.topk(min(k, size)).values.sum(-1)
        ambiguous |= (case.options["tail"] != "none") & (rest < 1e-3) & (k < size)
    return Exact(value, value_error, g, g_error, ambiguous)

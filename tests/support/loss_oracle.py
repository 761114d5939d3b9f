"""The loss in float64 plain PyTorch, and inputs at a chosen distance between student and teacher."""

import torch


def logits64(hidden, head, vocab_size=None):
    """float64 logits of an LMHead whose tensors may be float64 stand-ins that require grad."""
    z = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * head.scale
    if head.softcap is not None:
        z = torch.tanh(z / head.softcap) * head.softcap
    return z[..., : head.vocab_size]


def token_kl64(z_s, z_t, temperature=1.0):
    """KL(p || q) per row; entries where both are -inf count as 0."""
    log_p = (z_s / temperature).log_softmax(-1)
    log_q = (z_t / temperature).log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q).nan_to_num(0.0, torch.inf, -torch.inf), 0.0).sum(-1)


def states(rows, width, vocabulary, spread, dtype=torch.bfloat16, seed=0, boost=3.0):
    """(h_s, W, h_t): random hidden states, a head with a few boosted tokens, a teacher `spread` away."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, width, generator=g)
    w = torch.randn(vocabulary, width, generator=g) / width**0.5
    w[torch.randperm(vocabulary, generator=g)[: max(1, vocabulary // 50)]] *= boost
    h_t = h + spread * torch.randn(rows, width, generator=g)
    return h.to(dtype), w.to(dtype), h_t.to(torch.float32)


def relative_error(value, reference):
    """Norm of the difference over the norm of the reference (or alone, where that is 0)."""
    scale = float(reference.double().norm())
    return float((value.double() - reference.double()).norm()) / (scale or 1.0)

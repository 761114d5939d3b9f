"""The loss in float64 plain PyTorch, and inputs at a chosen distance between student and teacher."""

import torch

from opcd_fast.loss import LMHead, fused_linear_divergence

TINY = torch.finfo(torch.float32).tiny


def logits64(hidden, head, vocab_size=None):
    """float64 logits of an LMHead whose tensors may be float64 stand-ins that require grad."""
    z = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * head.scale
    if head.softcap is not None:
        z = torch.tanh(z / head.softcap) * head.softcap
    return z[..., : head.vocab_size]


def kl64(log_a, log_b):
    """KL(a || b) per row; a token to which a gives (almost) nothing counts as 0."""
    said = log_a.exp() >= TINY
    log_a, log_b = torch.where(said, log_a, 0.0), torch.where(said, log_b, 0.0)
    return torch.where(said, log_a.exp() * (log_a - log_b), 0.0).sum(-1)


def token_kl64(z_s, z_t, temperature=1.0):
    return kl64((z_s / temperature).log_softmax(-1), (z_t / temperature).log_softmax(-1))


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


def divergence64(z_s, z_t, name, beta=0.5, alpha=0.1, k=256, tail="none", gate="kl"):
    """The textbook formula of each divergence per row, from logits / temperature."""
    log_p, log_q = z_s.log_softmax(-1), z_t.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if name == "reverse_kl" or (name == "jsd" and beta == 1) or (name == "skew_reverse_kl" and alpha == 0):
        return kl64(log_p, log_q)
    if name == "forward_kl" or (name == "jsd" and beta == 0) or (name == "skew_forward_kl" and alpha == 0):
        return kl64(log_q, log_p)
    if name == "jsd":
        log_m = ((1 - beta) * p + beta * q).clamp(min=1e-300).log()
        return beta * kl64(log_q, log_m) + (1 - beta) * kl64(log_p, log_m)
    if name == "skew_reverse_kl":
        return kl64(log_p, (alpha * p + (1 - alpha) * q).clamp(min=1e-300).log())
    if name == "skew_forward_kl":
        return kl64(log_q, (alpha * q + (1 - alpha) * p).clamp(min=1e-300).log())
    if name == "gated_kl":
        w = gate64(log_p.detach(), log_q, gate)
        forward = kl64(log_q, log_p)
        # Where the gate is 1 the reverse KL, which may be infinite, has no part in it, nor in the gradient.
        reverse = kl64(log_p, torch.where((w == 1).unsqueeze(-1), log_p.detach(), log_q))
        return torch.where(forward == float("inf"), forward, (1 - w) * reverse + w * forward)
    assert name == "topk_reverse_kl"
    chosen = z_s.detach().topk(min(k, z_s.shape[-1]), dim=-1).indices
    log_p_k, log_q_k = log_p.gather(-1, chosen), log_q.gather(-1, chosen)
    if tail == "renormalize":
        return kl64(log_p_k.log_softmax(-1), log_q_k.log_softmax(-1))
    value = (log_p_k.exp() * (log_p_k - log_q_k)).sum(-1)
    if tail == "bucket" and k < z_s.shape[-1]:
        rest = torch.ones_like(z_s).scatter(-1, chosen, 0.0)
        rest_p, rest_q = (p * rest).sum(-1), (q * rest).sum(-1)
        value = value + rest_p * (rest_p / rest_q).log()
    return value


def gate64(log_p, log_q, gate):
    """The gate of "gated_kl" per row, from its definition."""
    reverse = kl64(log_p, log_q)
    w = -torch.expm1(-reverse) if gate == "kl" else (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    return torch.where(reverse == float("inf"), 1.0, w)


def leaf(tensor, dtype=None):
    return None if tensor is None else tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()


def problem(rows=9, width=16, vocabulary=701, spread=0.3, dtype=torch.float32, **transform):
    """(student's head, its hidden states, teacher's head, its hidden states)"""
    h, w, h_t = states(rows, width, vocabulary, spread, dtype)
    return LMHead(w, **transform), h, LMHead(w.clone(), **transform), h_t


def compare(
    student, h, teacher, h_t, backend, name="reverse_kl", parameters=None, temperature=1.0, weights=None,
    tolerance=1e-4, **options,
):  # fmt: skip
    """Run a loss and its float64 twin; check loss, statistics, every gradient. Returns the statistics."""
    parameters = parameters or {}
    transform = student.scale, student.softcap, student.vocab_size
    head, h_leaf = LMHead(leaf(student.weight), leaf(student.bias), *transform), leaf(h)
    loss, stats = fused_linear_divergence(
        h_leaf, head, h_t, teacher, divergence=name, temperature=temperature, token_weights=weights, return_stats=True,
        backend=backend, **parameters, **options,
    )  # fmt: skip
    loss.backward()

    twin = LMHead(leaf(student.weight, torch.float64), leaf(student.bias, torch.float64), *transform)
    h_twin = leaf(h, torch.float64)
    z_s, z_t = logits64(h_twin, twin) / temperature, logits64(h_t, teacher) / temperature
    value = divergence64(z_s, z_t, name, **parameters)
    w = torch.ones(value.shape) if weights is None else weights.double()
    exact, used = (w * value).sum() / options.get("denominator", w.sum()), w != 0
    exact.backward()
    z_s = z_s.detach()
    assert (stats.gate is None) == (name != "gated_kl")
    gate = (stats.gate, gate64(z_s.log_softmax(-1), z_t.log_softmax(-1), parameters.get("gate", "kl")), 3e-3, 1e-6)

    assert abs(float(loss.detach()) - float(exact.detach())) <= 1e-3 * abs(float(exact.detach())) + 1e-7
    for found, wanted, rtol, atol in (
        (stats.token_kl, value.detach(), 3e-3, 1e-7),
        (stats.student_entropy, torch.distributions.Categorical(logits=z_s).entropy(), 1e-4, 1e-5),
        (stats.student_logsumexp, z_s.logsumexp(-1), 1e-5, 1e-5),
        (stats.teacher_logsumexp, z_t.logsumexp(-1), 1e-5, 1e-5),
        (stats.top1_agreement, z_s.argmax(-1) == z_t.argmax(-1), 0, 0),
        *([gate] if name == "gated_kl" else []),
    ):
        torch.testing.assert_close(found.double(), torch.where(used, wanted.double(), 0), rtol=rtol, atol=atol)
    for ours, theirs in ((h_leaf, h_twin), (head.weight, twin.weight), (head.bias, twin.bias)):
        if ours is None:
            continue
        assert ours.grad.dtype == ours.dtype
        error = relative_error(ours.grad, theirs.grad)
        assert error < (max(tolerance, 3e-3) if ours.dtype == torch.bfloat16 else tolerance), error
    return stats

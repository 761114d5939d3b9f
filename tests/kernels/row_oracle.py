"""What the row operations compute, by float64 autograd of the definitions; inputs; and every implementation."""

import functools
import itertools
import os
from unittest import mock

import pytest
import torch
from loss_oracle import divergence64, gate64

from opcd_fast.kernels.csrc import native
from opcd_fast.kernels.reference import Logits
from opcd_fast.kernels.reference import divergences as specification

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
CASES = [
    ("reverse_kl", 0.0), ("forward_kl", 0.0), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.97), ("skew_reverse_kl", 0.1),
    ("skew_reverse_kl", 0.9), ("skew_forward_kl", 0.1), ("skew_forward_kl", 0.9), ("gated_kl", "kl"),
    ("gated_kl", "tv"),
]  # fmt: skip
FEW = [CASES[0], CASES[1], CASES[3], CASES[5], CASES[7], *CASES[9:]]  # one of each divergence, both gates
LEVELS = native.supported_levels() if native.available() else ()
KINDS = ["torch", "triton", *LEVELS]


def implementation(kind):
    """divergence_rows of this kind: plain PyTorch, a Triton kernel, or C++ at an instruction set."""
    if kind == "torch":
        return specification.divergence_rows
    if kind in LEVELS:

        def at_level(*arguments, **options):
            with mock.patch.dict(os.environ, {native.LEVEL_VARIABLE: kind}):
                native.divergence_rows(*arguments, **options)

        return at_level
    pytest.importorskip("triton")
    from opcd_fast.kernels import triton

    return functools.partial(triton.divergence_rows, splits=2)


def pairs(cases, kinds=KINDS):
    """Every implementation with every case."""
    return list(itertools.product(kinds, cases))


def logits64(side, z):
    z = z if side.bias is None else z + side.bias.double()
    z = z * side.scale
    return (z if side.softcap is None else torch.tanh(z / side.softcap) * side.softcap) / side.temperature


def keywords(case):
    """A case as a row operation takes it."""
    name, parameter = case
    return {"divergence": name, "gate" if name == "gated_kl" else "parameter": parameter}


def oracle(case, student, teacher, weights):
    """Statistics and gradient in float64."""
    leaf = student.z.double().clone().requires_grad_()
    z_s, z_t = logits64(student, leaf), logits64(teacher, teacher.z.double())
    exists = ~(torch.isinf(z_s.detach()) & torch.isinf(z_t))  # a token that both forbid does not
    low = torch.finfo(torch.float64).min / 4
    z_s, z_t = torch.where(exists, z_s, low), torch.where(exists, z_t, low)
    value = divergence64(z_s, z_t, case[0], beta=case[1], alpha=case[1], gate=case[1])
    (value * weights.double()).sum().backward()
    gradient = leaf.grad.masked_fill((value == INF).unsqueeze(-1), 0.0)
    log_p = z_s.detach().log_softmax(-1)
    entropy = -torch.where(log_p > -700, log_p.exp() * log_p, 0.0).sum(-1)
    agreement = z_s.argmax(-1) == z_t.argmax(-1)
    lse_s, lse_t = z_s.detach().logsumexp(-1), z_t.logsumexp(-1)
    gate = torch.zeros_like(lse_s)
    if case[0] == "gated_kl":
        gate = gate64(z_s.detach().log_softmax(-1), z_t.log_softmax(-1), case[1])
    return torch.stack([value.detach(), entropy, lse_s, lse_t, agreement.double(), gate]), gradient


def run(rows, case, student, teacher, weights, gradient=True, dtype=None, **options):
    """Statistics and gradient (or None) from copies of the inputs."""
    copies = [
        side._replace(z=side.z.clone().to(DEVICE), bias=None if side.bias is None else side.bias.to(DEVICE))
        for side in (student, teacher)
    ]
    kind = torch.float64 if student.z.dtype == torch.float64 else torch.float32
    statistics = torch.zeros(6, len(student.z), dtype=kind, device=DEVICE)
    g = torch.full(student.z.shape, 7.0, dtype=dtype or kind, device=DEVICE) if gradient else None
    rows(*copies, weights.to(DEVICE, kind), statistics, g, **keywords(case), **options)
    return statistics.cpu(), None if g is None else g.cpu()


def inputs(n, columns, spread=0.3, offset=0.0, dtype=torch.float32, **transform):
    """Two sides whose logits are `spread` apart, and row weights."""
    g = torch.Generator().manual_seed(columns)
    z_s = torch.randn(n, columns, generator=g) * 3
    z_t = z_s + spread * torch.randn(n, columns, generator=g) + offset
    return Logits(z_s.to(dtype), **transform), Logits(z_t.to(dtype), **transform), torch.rand(n, generator=g) + 0.1


def error(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


def check(rows, case, student, teacher, weights, tolerance=2e-5, **options):
    statistics, g = run(rows, case, student, teacher, weights, **options)
    exact_statistics, exact_g = oracle(case, student, teacher, weights)
    torch.testing.assert_close(statistics, exact_statistics.float(), rtol=1e-4, atol=1e-6)
    assert error(g, exact_g) < tolerance
    return statistics, g

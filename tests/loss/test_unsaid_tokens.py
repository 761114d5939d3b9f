"""Which losses move the student to what it never says: the table of docs/loss.md, recomputed."""

import re
from pathlib import Path

import pytest
import torch

from opcd_fast.loss import DIVERGENCES, LMHead, fused_linear_divergence

PAGE = Path(__file__).resolve().parents[2] / "docs" / "loss.md"


def pull(p, q, name, gate):
    """-dL/dz of the first token, with log-probabilities as hidden states and a head that hands them through."""
    z, head = p.log().requires_grad_(), LMHead(torch.eye(p.shape[1], dtype=torch.float64))
    fused_linear_divergence(z, head, q.log(), head, divergence=name, gate=gate).backward()
    return -float(z.grad[0, 0])


def test_the_page_says_which_losses_pull_on_a_token_that_the_student_never_says():
    """It has probability 1e-6 for the student and 0.9 for the teacher; both spread the rest alike."""
    p, q = (torch.tensor([[x, *[(1 - x) / 20] * 20]], dtype=torch.float64) for x in (1e-6, 0.9))
    rows = re.findall(r"^\| (`\w+`.*?) \| (\d\S*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    said = {name: float(number) for names, number in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(said) == set(DIVERGENCES)
    for name, number in said.items():
        for gate in ("kl", "tv"):
            assert pull(p, q, name, gate) == pytest.approx(number, rel=0.05), name


def test_the_gate_is_at_least_the_mass_outside_of_the_students_support_and_bounds_the_total_variation():
    """As the page says: also where KL(p || q) is small."""
    g = torch.Generator().manual_seed(0)
    z_s, z_t = (torch.randn(200, 30, generator=g, dtype=torch.float64) for _ in range(2))
    z_t = z_s + torch.logspace(-2, 1, 200, dtype=torch.float64).unsqueeze(-1) * z_t
    z_s[:, :5] = -60.0  # hardly ever said
    head = LMHead(torch.eye(30, dtype=torch.float64))
    gates = [
        fused_linear_divergence(z_s, head, z_t, head, divergence="gated_kl", gate=gate, return_stats=True)[1].gate
        for gate in ("kl", "tv")
    ]
    outside = z_t.softmax(-1)[:, :5].sum(-1).float()
    for gate in gates:
        assert (gate >= outside - 1e-6).all() and (gate <= 1).all()
    assert (gates[1] <= gates[0].sqrt() + 1e-6).all() and float(gates[1].min()) < 0.2

"""The two systems that exist in the experiments alone, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

from experiments.variants import forward_then_reverse, todi
from opcd_fast.loss import LMHead, fused_linear_divergence
from opcd_fast.training import OPCDTrainer


@pytest.fixture
def hidden():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randn(37, 8, dtype=torch.float64)


def computed(hidden, divergence="gated_kl"):
    student, teacher, weight = hidden
    head = LMHead(weight)
    value = fused_linear_divergence(student, head, teacher, head, divergence=divergence, backend="torch")
    return value, torch.autograd.grad(value, student)[0]


def test_todi(hidden):
    student, teacher, weight = hidden
    log_p, log_q = (student @ weight.T).log_softmax(-1), (teacher @ weight.T).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    a = (q / (p + q)).detach()
    wanted = (a * q * (log_q - log_p) + (1 - a) * p * (log_p - log_q)).sum(-1).mean()
    with todi(40):
        value, gradient = computed(hidden)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, student)[0])


@pytest.mark.parametrize(("step", "weight"), [(0, 1.0), (1, 0.75), (4, 0.0)])
def test_forward_then_reverse(hidden, monkeypatch, step, weight):
    monkeypatch.setattr(OPCDTrainer, "_train_step", lambda trainer, step, *rest: computed(hidden))
    with forward_then_reverse(5):
        value, gradient = OPCDTrainer._train_step(None, step, None)
    ends = [computed(hidden, name) for name in ("forward_kl", "reverse_kl")]
    for found, forward, reverse in zip((value, gradient), *ends):
        torch.testing.assert_close(found, weight * forward + (1 - weight) * reverse)


def test_a_variant_that_was_not_used_is_an_error(hidden, monkeypatch):
    monkeypatch.setattr(OPCDTrainer, "_train_step", lambda trainer, step, *rest: computed(hidden, "reverse_kl"))
    with pytest.raises(RuntimeError, match="not tried"), todi(40):
        OPCDTrainer._train_step(None, 0, None)
    with todi(40):
        pass  # a run that has ended takes no step
    before = computed(hidden)[0]
    with todi(40):
        assert computed(hidden)[0] != before
    assert computed(hidden)[0] == before

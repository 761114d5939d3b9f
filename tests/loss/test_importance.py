"""The sampler against the trainer: log-probabilities by hand, weights that are right in expectation."""

import itertools
import math

import pytest
import torch
from tiny import logprobs_by_hand, tiny_model

from opcd_fast.data import Sample, pack
from opcd_fast.errors import InputError
from opcd_fast.loss import Drift, LMHead, importance_weights
from opcd_fast.loss.importance import logits_of
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training.step import context_kl

PREFIX = torch.arange(20, 31)


@pytest.mark.parametrize("kind", ["plain", "bias", "scaled", "capped"])
def test_one_logit_per_row(kind):
    torch.manual_seed(0)
    h, weight, bias = torch.randn(9000, 5), torch.randn(37, 5), torch.randn(37)
    ids = torch.randint(0, 37, (9000,))
    head = LMHead(
        weight, bias if kind == "bias" else None, 0.25 if kind == "scaled" else 1.0, 3.0 if kind == "capped" else None
    )
    z = h.double() @ weight.double().T
    z = {"plain": z, "bias": z + bias, "scaled": z * 0.25, "capped": 3 * torch.tanh(z / 3)}[kind]
    torch.testing.assert_close(logits_of(h, head, ids), z.gather(1, ids[:, None])[:, 0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("correction", ["token", "sequence", "none"])
def test_weights_make_up_for_another_sampler(correction):
    """All answers of two Markov chains over three tokens, one of which ends an answer: expected sums are equal."""
    torch.manual_seed(1)
    p, q = (torch.randn(4, 3, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    term = torch.rand(4, dtype=torch.float64)  # what a position adds, which depends on the token before it

    def total(chain, weighted):
        value = 0.0
        for answer in itertools.product(range(3), repeat=4):
            stop = answer.index(0) + 1 if 0 in answer else 4
            if any(answer[stop:]):
                continue  # each answer once
            states = [3, *answer][:stop]
            own = torch.stack([p[s, t] for s, t in zip(states, answer)])
            drawn = torch.stack([chain[s, t] for s, t in zip(states, answer)])
            weights = torch.ones(stop, dtype=torch.float64)
            if weighted:
                cu = torch.tensor([0, stop])
                weights = importance_weights(own, drawn, cu, correction, math.inf).double()
            value += math.exp(float(drawn.sum())) * float((weights * term[torch.tensor(states)]).sum())
        return value

    truth = total(p, False)
    assert total(p, correction != "none") == pytest.approx(truth, rel=1e-6)  # where they agree nothing changes
    if correction == "none":
        assert abs(total(q, False) / truth - 1) > 0.02
    else:
        assert total(q, True) == pytest.approx(truth, rel=1e-5)


def answers(shift):
    """Two answers with log-probabilities that are off by `shift` per token from those of the tiny model."""
    model, samples = tiny_model(), []
    for prompt, response in (([7, 8, 9, 4], [40, 41, 42]), ([50, 51], [60, 61, 62, 63, 64])):
        exact = logprobs_by_hand(tiny_model(dtype=torch.float64), prompt, response, 0.8)
        off = [float(value) + s for value, s in zip(exact, shift)]
        samples.append(Sample(prompt, prompt, 0, response, off))
    return model, samples


def objective(samples, model, **options):
    batch = pack(samples)
    teacher = ContextTeacher(tiny_model(seed=3), [PREFIX])
    return batch, context_kl(
        batch, model, teacher, temperature=0.8, denominator=len(samples), compute_dtype=torch.float32, **options
    )


@pytest.mark.parametrize("correction", ["none", "token"])
def test_drift_is_what_the_logprobs_say(correction):
    shift = [0.1, -0.3, 0.2, 0.0, 0.4]
    model, samples = answers(shift)
    drift = Drift()
    objective(samples, model, drift=drift.add, correction=correction, clip=2.0)
    offs = shift[:3] + shift
    record = drift.record()
    assert record["sampler_distance"] == pytest.approx(sum(map(abs, offs)) / 8, rel=1e-4)
    assert record["sampler_kl"] == pytest.approx(sum(math.exp(-s) - 1 + s for s in offs) / 8, rel=1e-3)
    assert ("importance_weight" in record) == (correction != "none")
    assert Drift().record() == {}


def test_tokens_that_another_model_wrote_do_not_count_in_the_drift():
    shift = [0.1, -0.3, math.nan, 0.0, math.nan]
    model, samples = answers(shift)
    drift = Drift()
    _, (loss, _) = objective(samples, model, drift=drift.add)
    assert math.isfinite(float(loss)) and drift.tokens == 5
    assert drift.record()["sampler_distance"] == pytest.approx((0.1 + 0.3 + 0.1 + 0.3) / 5, rel=1e-4)


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_the_corrected_loss_and_gradient_by_hand(correction):
    shift = [0.5, -0.9, 0.2, 0.6, 0.4]
    model, samples = answers(shift)
    batch, (loss, stats) = objective(samples, model, correction=correction, clip=1.4)
    loss.backward()
    found = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    ratios = [math.exp(-s) for s in shift]
    factors = []
    for length in (3, 5):
        for t in range(length):
            factors.append(min(1.4, math.prod(ratios[:length] if correction == "sequence" else ratios[:t])))
    assert float(loss.detach()) == pytest.approx(
        float((stats.token_kl * batch.token_weights * torch.tensor(factors)).sum()) / 2, rel=1e-4
    )
    by_hand = 0.0
    double, other = tiny_model(dtype=torch.float64), tiny_model(seed=3, dtype=torch.float64)
    place = 0
    for sample in samples:
        ids, n = [*sample.student_prompt, *sample.response], len(sample.response)
        p = (double(torch.tensor([ids])).logits[0, -n - 1 : -1] / 0.8).log_softmax(-1)
        with torch.no_grad():
            q = (other(torch.tensor([[*PREFIX.tolist(), *ids]])).logits[0, -n - 1 : -1] / 0.8).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        by_hand = by_hand + (kl * torch.tensor(factors[place : place + n])).sum() / n / 2
        place += n
    by_hand.backward()
    torch.testing.assert_close(
        found, double.model.layers[0].mlp.up_proj.weight.grad.float(), rtol=1e-3, atol=1e-6
    )


def test_a_sampler_without_logprobs_cannot_be_corrected():
    model, samples = answers([0.0] * 5)
    bare = [Sample(s.student_prompt, s.teacher_prompt, 0, s.response) for s in samples]
    with pytest.raises(InputError, match="importance_correction"):
        objective(bare, model, correction="token")
    drift = Drift()
    objective(bare, model, drift=drift.add)
    assert drift.record() == {}

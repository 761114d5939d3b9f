"""Drawing a token: against the cumulative distribution in float64, and at its edges."""

import pytest
import torch

from opcd_fast.rollout.sampling import draw, nucleus


def test_the_token_is_where_the_cumulative_mass_passes_u():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 37, generator=generator) * 2
    uniform = torch.rand(400, dtype=torch.float64, generator=generator)
    tokens, logprobs = draw(logits, uniform, 0.7, 1.0)
    exact = (logits.double() / 0.7).log_softmax(-1)
    mass = exact.exp().cumsum(-1)
    after = mass.gather(1, tokens[:, None]).squeeze(1)
    before = after - exact.exp().gather(1, tokens[:, None]).squeeze(1)
    assert (after > uniform - 1e-6).all() and (before < uniform + 1e-6).all()
    torch.testing.assert_close(logprobs.double(), exact.gather(1, tokens[:, None]).squeeze(1), atol=1e-5, rtol=0)


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    tokens, _ = draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0)
    assert tokens.tolist() == [1, 3, 3]
    tokens, logprobs = draw(logits, torch.zeros(3, dtype=torch.float64), 1.0, 1.0, vocab_size=2)
    assert tokens.tolist() == [1, 1, 1] and logprobs.abs().max() == 0


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_the_nucleus_is_the_smallest_set_with_that_mass(top_p):
    scores = torch.randn(50, 23, generator=torch.Generator().manual_seed(1))
    kept = nucleus(scores, top_p).isfinite()
    for row, inside in zip(scores.double().softmax(-1), kept):
        assert row[inside].sum() >= top_p - 1e-6 and row[inside].sum() - row[inside].min() < top_p + 1e-6
        assert row[inside].min() >= (row[~inside].max() if (~inside).any() else 0)

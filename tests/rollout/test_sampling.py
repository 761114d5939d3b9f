"""Drawing a token: against the cumulative distribution in float64, and at its edges."""

import pytest
import torch
from memory_record import peak_bytes

from opcd_fast.rollout.memory import BYTES_PER_LOGIT
from opcd_fast.rollout.sampling import draw, nucleus

NEARLY_ONE = 1 - 2**-53


def random_rows(rows, vocabulary, spread=2.0):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator) * spread
    return logits, torch.rand(rows, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("vocabulary", [1, 37, 255, 256, 257, 1000, 49_155])
@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 0.7), (torch.bfloat16, 1.0)])
def test_the_token_is_where_the_cumulative_mass_passes_u(vocabulary, dtype, temperature):
    """The token of float64's sums, but where u is within rounding of the border between two."""
    logits, uniform = random_rows(300, vocabulary)
    logits = logits.to(dtype)
    tokens, logprobs = draw(logits, uniform, temperature, 1.0)
    exact = (logits.double() / temperature).log_softmax(-1)
    mass = exact.exp().cumsum(-1)
    wanted = torch.searchsorted(mass, uniform[:, None], right=True).squeeze(1)
    after = mass.gather(1, tokens[:, None]).squeeze(1)
    before = after - exact.exp().gather(1, tokens[:, None]).squeeze(1)
    assert (after > uniform - 3e-7).all() and (before < uniform + 3e-7).all()
    assert (tokens == wanted).float().mean() > 0.98
    torch.testing.assert_close(logprobs.double(), exact.gather(1, tokens[:, None]).squeeze(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.3, 0.8)])
def test_a_million_draws_follow_the_distribution(temperature, top_p):
    """Chi-squared, over a vocabulary of several blocks."""
    logits, _ = random_rows(1, 700)
    draws = 10**6
    uniform = torch.rand(100, draws // 100, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    rows = logits.expand(uniform.shape[1], -1)
    counts = torch.zeros(700, dtype=torch.int64)
    for part in uniform:
        counts += torch.bincount(draw(rows, part, temperature, top_p)[0], minlength=700)
    scores = logits.double() / temperature
    expected = draws * (nucleus(scores, top_p) if top_p < 1 else scores).softmax(-1)[0]
    assert not counts[expected == 0].any()
    inside = expected > 0
    freedom = int(inside.sum()) - 1
    chi = float(((counts - expected)[inside] ** 2 / expected[inside]).sum())
    assert freedom > 100 and abs(chi - freedom) < 4 * (2 * freedom) ** 0.5


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    tokens, _ = draw(logits, torch.tensor([0.0, 0.5, NEARLY_ONE], dtype=torch.float64), 1.0, 1.0)
    assert tokens.tolist() == [1, 3, 3]
    tokens, logprobs = draw(logits, torch.zeros(3, dtype=torch.float64), 1.0, 1.0, vocab_size=2)
    assert tokens.tolist() == [1, 1, 1] and logprobs.abs().max() == 0


@pytest.mark.parametrize("alive", [[300], [255, 256], [3, 700, 1023], [256, 511]])
def test_whole_blocks_without_probability_are_passed_over(alive):
    logits = torch.full((1, 1024), -torch.inf)
    logits[0, alive] = 0.0
    shares = torch.arange(len(alive), dtype=torch.float64) / len(alive)
    uniform = torch.cat([shares + 1e-9, shares + 1 / len(alive) - 1e-9, shares.new_tensor([0.0, NEARLY_ONE])])
    tokens, logprobs = draw(logits.expand(len(uniform), -1), uniform, 1.0, 1.0)
    assert tokens.tolist() == [*alive, *alive, alive[0], alive[-1]]
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -torch.tensor(len(alive)).log()))


@pytest.mark.parametrize("vocabulary", [300, 5000])
def test_the_smallest_and_the_largest_number_draw_what_can_be_drawn(vocabulary):
    logits, _ = random_rows(200, vocabulary, spread=30.0)  # most masses are 0 in float32
    for number, ends in ((0.0, False), (NEARLY_ONE, True)):
        tokens, logprobs = draw(logits, torch.full((200,), number, dtype=torch.float64), 1.0, 1.0)
        assert logprobs.isfinite().all() and (logprobs > -104).all()
        drawable = (logits - logits.max(-1, keepdim=True).values).exp() > 0
        first = drawable.int().argmax(-1)
        if not ends:
            assert torch.equal(tokens, first)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_the_nucleus_is_the_smallest_set_with_that_mass(top_p):
    scores = torch.randn(50, 23, generator=torch.Generator().manual_seed(1))
    kept = nucleus(scores, top_p).isfinite()
    for row, inside in zip(scores.double().softmax(-1), kept):
        assert row[inside].sum() >= top_p - 1e-6 and row[inside].sum() - row[inside].min() < top_p + 1e-6
        assert row[inside].min() >= (row[~inside].max() if (~inside).any() else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("temperature", "top_p", "most"), [(1.0, 1.0, 12), (0.7, 1.0, 16), (0.7, 0.9, BYTES_PER_LOGIT)]
)
def test_bytes_for_each_logit(dtype, temperature, top_p, most):
    logits, uniform = random_rows(8, 20_000)
    logits = logits.to(dtype)
    held = peak_bytes(lambda: draw(logits, uniform, temperature, top_p)) / logits.numel() + dtype.itemsize
    assert held < most * 1.02  # and the sums of blocks

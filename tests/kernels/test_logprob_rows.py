"""The row operation of a token's log-probability, in PyTorch and in Triton, against float64 autograd."""

import pytest
import torch

from opcd_fast.kernels.reference import Logits
from opcd_fast.kernels.reference import logprobs as specification

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
PLAIN = {"scale": 1.0, "softcap": None, "temperature": 1.0}


@pytest.fixture(params=["torch", "triton"])
def rows(request):
    """One implementation of logprob_rows."""
    if request.param == "torch":
        return specification.logprob_rows
    pytest.importorskip("triton")
    from opcd_fast.kernels.triton import logprob_rows

    return logprob_rows


def oracle(z, bias, ids, weights, *, scale, softcap, temperature):
    leaf = z.double().clone().requires_grad_()
    logits = (leaf if bias is None else leaf + bias.double()) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    log_p = (logits / temperature).log_softmax(-1)
    logprob = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    (logprob * weights.double()).sum().backward()
    log_p = log_p.detach()
    entropy = -torch.where(log_p > -700, log_p.exp() * log_p, 0.0).sum(-1)
    gradient = leaf.grad.masked_fill((logprob == -INF).unsqueeze(-1), 0.0)
    return torch.stack([logprob.detach(), entropy]), gradient


def run(rows, z, bias, ids, weights, gradient=True, **options):
    z, bias = (None if x is None else x.clone().to(DEVICE, z.dtype) for x in (z, bias))
    scratch = {name: options.pop(name) for name in ("scratch",) if name in options}
    statistics = torch.zeros(2, len(z), dtype=z.dtype, device=DEVICE)
    g = torch.full(z.shape, 7.0, dtype=z.dtype, device=DEVICE) if gradient else None
    logits = Logits(z, bias, **{**PLAIN, **options})
    rows(logits, ids.to(DEVICE), weights.to(DEVICE, z.dtype), statistics, g, **scratch)
    return statistics.cpu(), None if g is None else g.cpu()


def inputs(n, columns, dtype=torch.float32):
    g = torch.Generator().manual_seed(columns)
    z = 3 * torch.randn(n, columns, generator=g)
    ids = torch.randint(0, columns, (n,), generator=g)
    return z.to(dtype), torch.randn(columns, generator=g).to(dtype), ids, torch.rand(n, generator=g).to(dtype) + 0.1


def check(rows, z, bias, ids, weights, tolerance=2e-6, **options):
    statistics, g = run(rows, z, bias, ids, weights, **options)
    exact_statistics, exact_g = oracle(z, bias, ids, weights, **{**PLAIN, **options})
    torch.testing.assert_close(statistics.double(), exact_statistics, rtol=tolerance, atol=tolerance / 10)
    assert float((g - exact_g).norm() / exact_g.norm()) < tolerance
    return statistics, g


@pytest.mark.parametrize("columns", [2, 511, 512, 513, 1100])
def test_every_remainder_of_the_block(columns, rows):
    z, _, ids, weights = inputs(3, columns)
    ids[0], ids[1] = 0, columns - 1
    check(rows, z, None, ids, weights)


def test_blocks_of_rows_change_nothing():
    problem = inputs(5, 700)
    whole, blocks = (
        run(specification.logprob_rows, *problem, softcap=5.0, scratch=torch.empty(3, block, 700)) for block in (5, 2)
    )
    for a, b in zip(whole, blocks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_nearly_certain_token_keeps_its_digits(rows):
    z, _, ids, weights = inputs(3, 700)
    z[torch.arange(3), ids] += torch.tensor([20.0, 23.0, 26.0])
    z += 40.0
    statistics, g = run(rows, z, None, ids, weights)
    exact_statistics, exact_g = oracle(z, None, ids, weights, **PLAIN)
    assert (exact_statistics[0] > -1e-2).all()
    # Sums are 1 and a little; what is below the rounding of 1 is not seen.
    torch.testing.assert_close(statistics.double(), exact_statistics, rtol=1e-3, atol=2e-7)
    torch.testing.assert_close(g.double(), exact_g, rtol=1e-3, atol=2e-7)


def test_forbidden_tokens_and_rows_with_nan(rows):
    """Row 0: forbidden tokens, not the given one; row 1: the given one; row 2: NaN; row 3: the lowest number."""
    z, _, ids, weights = inputs(4, 1100)
    ids[:] = torch.tensor([7, 9, 11, 1099])
    z[0, 100:900] = z[1, 9] = -INF
    z[3, :600] = torch.finfo(torch.float32).min
    finite = [0, 1, 3]
    exact_statistics, exact_g = oracle(z, None, ids, weights, **PLAIN)
    z[2, 500] = float("nan")
    statistics, g = run(rows, z, None, ids, weights)
    assert statistics[:, 2].isnan().all() and g[2].isnan().any()
    assert float(statistics[0, 1]) == -INF and not g[1].any()
    torch.testing.assert_close(statistics[:, finite], exact_statistics[:, finite].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(g[finite], exact_g[finite].float(), rtol=1e-5, atol=1e-8)


def test_the_neighbours_of_a_gradient_in_memory(rows):
    z, _, ids, weights = inputs(2, 700)
    buffer = torch.full((2, 704), 9.0, device=DEVICE, dtype=torch.float16)
    arguments = (Logits(z.to(DEVICE)), ids.to(DEVICE), weights.to(DEVICE), torch.zeros(2, 2, device=DEVICE))
    rows(*arguments, buffer[:, :700])
    assert (buffer[:, 700:] == 9).all() and (buffer[:, :700] != 9).all()


def test_no_rows_and_logits_of_another_dtype(rows):
    statistics, _ = run(rows, torch.empty(0, 8), None, torch.empty(0, dtype=torch.long), torch.empty(0))
    assert statistics.shape == (2, 0)
    if rows is not specification.logprob_rows:
        with pytest.raises(ValueError, match="float64"):
            run(rows, *inputs(2, 8, torch.float64))

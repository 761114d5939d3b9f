"""The row operation from float16 differences, in PyTorch and Triton, against float64 autograd on the same numbers."""

import functools

import pytest
import torch
from row_oracle import CASES, DEVICE, FEW, error, keywords, oracle

from opcd_fast.kernels.reference import Logits, differences

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
HEAD = {"scale": 0.5, "temperature": 0.7}
FACTORS = torch.tensor([1.0, 8.0, 0.25, 1.0])


def implementation(kind):
    if kind == "torch":
        return differences.difference_rows
    pytest.importorskip("triton")
    from opcd_fast.kernels import triton

    return functools.partial(triton.divergence_rows, difference=True, splits=2)


def inputs(columns=1030, spread=0.3, top=0.0):
    """z' and d' (4, columns), the largest logit of every row at `top`, and row weights."""
    g = torch.Generator().manual_seed(columns)
    z = torch.randn(4, columns, generator=g) * 4
    z += (top - z.amax(-1) * HEAD["scale"] / HEAD["temperature"]).unsqueeze(-1) / HEAD["scale"] * HEAD["temperature"]
    d = spread * torch.randn(4, columns, generator=g)
    halves = (Logits((x / FACTORS[:, None]).half(), None, factors=FACTORS, **HEAD) for x in (z, d))
    return *halves, torch.rand(4, generator=g) + 0.1


def run(kind, case, student, difference, weights, dtype=torch.float32, in_place=False):
    sides = [side._replace(z=side.z.clone().to(DEVICE), factors=FACTORS.to(DEVICE)) for side in (student, difference)]
    statistics = torch.zeros(6, 4, device=DEVICE)
    g = torch.full(student.z.shape, 7.0, dtype=dtype, device=DEVICE)
    g = sides[0].z.view(dtype) if in_place else g
    implementation(kind)(*sides, weights.to(DEVICE), statistics, g, **keywords(case))
    return statistics.cpu(), g.cpu()


def exactly(case, student, difference, weights):
    z, d = (side.z.double() * FACTORS.double()[:, None] for side in (student, difference))
    return oracle(case, Logits(z, **HEAD), Logits(z - d, **HEAD), weights)


@pytest.mark.parametrize("kind", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(kind, case):
    for spread in (1.0, 0.01, 1e-3):
        problem = inputs(spread=spread)
        statistics, g = run(kind, case, *problem)
        exact_statistics, exact_g = exactly(case, *problem)
        torch.testing.assert_close(statistics[0], exact_statistics[0].float(), rtol=2e-4, atol=1e-10)
        torch.testing.assert_close(statistics[1:], exact_statistics[1:].float(), rtol=1e-5, atol=2e-6)
        assert error(g, exact_g) < (5e-6 if spread == 1.0 else 5e-4)
        assert (statistics[0] >= 0).all()


@pytest.mark.parametrize("kind", ["torch", "triton"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_rows_that_float16_does_not_hold_are_marked_and_give_no_gradient(kind, case):
    """Of rows whose largest logit is 8.1 or -8.1, whose difference has overflown, and a good one, the last stays."""
    student, difference, weights = inputs(top=8.1)
    low = inputs(top=-8.1)[0].z
    student.z[1], student.z[2:] = low[1], inputs()[0].z[2:]
    difference.z[2, 5] = -float("inf")
    statistics, g = run(kind, case, student, difference, weights)
    exact_statistics, exact_g = exactly(case, student, difference, weights)
    assert statistics[0].isnan().tolist() == [True, True, True, False]
    assert not g[:3].any() and error(g[3], exact_g[3]) < 1e-4
    for top in (7.9, -7.9):
        assert run(kind, case, *inputs(top=top))[0].isfinite().all()


@pytest.mark.parametrize("kind", ["torch", "triton"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_gradient_may_lie_where_the_logits_were(kind, case):
    problem = inputs(columns=1543)
    apart, g = run(kind, case, *problem)
    over, there = run(kind, case, *problem, dtype=torch.bfloat16, in_place=True)
    assert torch.equal(over, apart)
    assert error(there, g.double()) < 8e-3  # Triton's interpreter truncates bf16


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_forbidden_tokens_do_not_exist(kind):
    student, difference, weights = inputs()
    student.z[:, 100:700] = -float("inf")
    for case in FEW:
        statistics, g = run(kind, case, student, difference, weights)
        exact_statistics, exact_g = exactly(case, student, difference, weights)
        torch.testing.assert_close(statistics, exact_statistics.float(), rtol=1e-4, atol=2e-6)
        assert error(g, exact_g) < 1e-4 and not g[:, 100:700].any()


def test_triton_wants_float16():
    student, difference, weights = inputs()
    with pytest.raises(ValueError, match=r"z_t is torch.float32.*float16"):
        implementation("triton")(
            student, difference._replace(z=difference.z.float()), weights, torch.zeros(6, 4), None, divergence="jsd",
            parameter=0.5,
        )  # fmt: skip

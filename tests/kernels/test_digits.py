"""Where float32 has few digits left: parameters next to their ends, a constant between the models, saturated rows."""

import itertools

import pytest
import torch
from mpmath import exp, log, mp, mpf  # comes with torch
from row_oracle import CASES, FEW, KINDS, LEVELS, error, implementation, inputs, oracle, pairs, run

from opcd_fast.kernels.reference import Logits

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
NAMES = ("jsd", "skew_reverse_kl", "skew_forward_kl")
PARAMETERS = (1e-12, 1e-8, 1e-3, 1 - 1e-3, 1 - 1e-8, 1 - 2**-53)


def exactly(name, parameter, z_s, z_t):
    """Value and gradient of one row (V,) in 60 digits: what float64 makes of 1 - 1e-16 is noise too."""
    with mp.workdps(60):
        e_s, e_t = ([exp(mpf(float(x))) for x in z] for z in (z_s, z_t))
        p, q = [x / sum(e_s) for x in e_s], [x / sum(e_t) for x in e_t]
        w = mpf(parameter)
        rest = 1 - w
        if name == "jsd":
            m = [rest * a + w * b for a, b in zip(p, q)]
            value = w * sum(b * log(b / c) for b, c in zip(q, m)) + rest * sum(a * log(a / c) for a, c in zip(p, m))
            phi = [rest * log(a / c) for a, c in zip(p, m)]
        elif name == "skew_reverse_kl":
            m = [w * a + rest * b for a, b in zip(p, q)]
            value, phi = sum(a * log(a / c) for a, c in zip(p, m)), [log(a / c) - w * a / c for a, c in zip(p, m)]
        else:
            m = [w * b + rest * a for a, b in zip(p, q)]
            value, phi = sum(b * log(b / c) for b, c in zip(q, m)), [-rest * b / c for b, c in zip(q, m)]
        mean = sum(a * f for a, f in zip(p, phi))
        return float(value), torch.tensor([float(a * (f - mean)) for a, f in zip(p, phi)], dtype=torch.float64)


@pytest.fixture(scope="module")
def rows():
    """(3, 40) student's and teacher's logits: far apart, with tokens that one side hardly says; apart; close."""
    g = torch.Generator().manual_seed(0)
    z_s = 3 * torch.randn(3, 40, generator=g)
    z_t = z_s + torch.tensor([[10.0], [1.0], [0.05]]) * torch.randn(3, 40, generator=g)
    z_s[0, 3], z_t[0, 4], z_t[0, 5] = -200.0, -200.0, 30.0
    z_s[0, 4] = 9.0
    exact = {case: [exactly(*case, z_s[i], z_t[i]) for i in range(3)] for case in itertools.product(NAMES, PARAMETERS)}
    return z_s, z_t, exact


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "a row" not in kind])
def test_parameters_next_to_the_ends(kind, name, rows):
    z_s, z_t, exact = rows
    for parameter in PARAMETERS:
        statistics, g = run(implementation(kind), (name, parameter), Logits(z_s), Logits(z_t), torch.ones(3))
        for row, (value, gradient) in enumerate(exact[name, parameter]):
            # Where one side says hardly anything else, the gradient is a small difference of its phi.
            assert abs(float(statistics[0, row]) - value) <= 1e-5 * value + 1e-14, (parameter, row)
            if (name, parameter) != ("skew_reverse_kl", PARAMETERS[-1]):  # whose gradient is 1e-32
                assert error(g[row], gradient) < (2e-2 if row == 0 else 2e-6), (parameter, row)


@pytest.mark.parametrize("constant", [100.0, -100.0, 3000.0])
@pytest.mark.parametrize("columns", [1030, 40_000])
@pytest.mark.parametrize(("kind", "case"), pairs(FEW, ["torch", "triton", *LEVELS]), ids=str)
def test_a_constant_on_one_side(kind, case, columns, constant):
    """It changes no distribution. C++ keeps the gradient's digits down to a KL of 1e-8; elsewhere l is rounded as the
    larger side's logits are."""
    if columns > 2000 and kind not in LEVELS:
        pytest.skip("few columns do for those")
    student, teacher, weights = inputs(2, columns, torch.tensor([[8e-3], [1.5e-4]]))
    # So that adding the constant rounds nothing: the question is the same with it and without.
    step = 2.0**-12 if abs(constant) > 1000 else 2.0**-16
    student, teacher = (x._replace(z=(x.z / step).round() * step) for x in (student, teacher))
    exact_statistics, exact_g = oracle(case, student, teacher, weights)
    statistics, g = run(implementation(kind), case, student, teacher._replace(z=teacher.z + constant), weights)
    for row in range(1 if abs(constant) > 1000 else 2):
        spread = (8e-3, 1.5e-4)[row]
        rounding = 2.0**-24 * abs(constant) / spread
        assert error(g[row], exact_g[row]) < (2e-3 if kind in LEVELS else 1e-3 + 2 * rounding), row
        value = float(exact_statistics[0, row])
        assert abs(float(statistics[0, row]) / value - 1) < (2e-3 if kind in LEVELS else 1e-2 + 4 * rounding), row


@pytest.mark.parametrize(("kind", "case"), pairs(CASES), ids=str)
def test_saturated_rows(kind, case):
    """A student that says one token alone has no gradient but what the forward KL gives to the teacher's, whichever
    token that is, and however large 1 / temperature makes the rest."""
    g = torch.Generator().manual_seed(0)
    z_s = 2 * torch.randn(12, 2100, generator=g)
    z_t = z_s + 1.5 * torch.randn(12, 2100, generator=g)
    z_s[:, 7] += 15
    z_t[torch.arange(12), torch.tensor([7, 7, 7, 7, 1100, 1100, 1100, 1100, 2099, 2099, 3, 3])] += 18
    z_t += torch.linspace(-30, 30, 12)[:, None]
    student, teacher = Logits(z_s, temperature=1e-3), Logits(z_t, temperature=1e-3)
    statistics, found = run(implementation(kind), case, student, teacher, torch.ones(12))
    exact_statistics, exact = oracle(case, student, teacher, torch.ones(12))
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()
    torch.testing.assert_close(statistics[0], exact_statistics[0].float(), rtol=1e-5, atol=1e-5)

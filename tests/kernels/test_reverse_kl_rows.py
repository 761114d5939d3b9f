"""The Triton row kernel against its executable specification in float64."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
from opcd_fast.kernels.reference import reverse_kl as reference
from opcd_fast.kernels.triton import reverse_kl as reverse_kl_rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def specified(z_s, z_t, bias_s, bias_t, weights, **options):
    """The reference on float64 copies."""
    z_s, z_t, weights = z_s.double(), z_t.double(), weights.double()
    statistics, g = torch.zeros(5, len(z_s), dtype=torch.float64), torch.empty_like(z_s)
    scratch = torch.empty(reference.scratch_planes(options["softcap_s"]), 2, z_s.shape[1], dtype=torch.float64)
    bias_s, bias_t = (None if bias is None else bias.double() for bias in (bias_s, bias_t))
    reference.reverse_kl_rows(
        z_s, z_t, bias_s, bias_t, weights, statistics, g, all_statistics=True, scratch=scratch, **options
    )
    return statistics, g


def launched(z_s, z_t, bias_s, bias_t, weights, all_statistics=True, gradient=True, **options):
    arguments = [None if x is None else x.to(DEVICE) for x in (z_s, z_t, bias_s, bias_t, weights)]
    statistics = torch.zeros(5, len(z_s), device=DEVICE)
    g = torch.full(z_s.shape, 7.0, device=DEVICE) if gradient else None
    reverse_kl_rows.reverse_kl_rows(*arguments, statistics, g, all_statistics=all_statistics, **options)
    return statistics.cpu(), None if g is None else g.cpu()


def inputs(rows, columns, spread=0.3):
    g = torch.Generator().manual_seed(columns)
    z_s = torch.randn(rows, columns, generator=g) * 3
    z_t = z_s + spread * torch.randn(rows, columns, generator=g)
    biases = torch.randn(2, columns, generator=g)
    return z_s, z_t, *biases, torch.rand(rows, generator=g)


PLAIN = {"scale_s": 1.0, "scale_t": 1.0, "softcap_s": None, "softcap_t": None, "temperature": 1.0}


@pytest.mark.parametrize("columns", [1, 3, 511, 512, 513, 1024, 4097])
def test_every_remainder_of_the_block(columns):
    z_s, z_t, _, _, weights = inputs(2, columns)
    statistics, g = launched(z_s, z_t, None, None, weights, **PLAIN)
    exact_statistics, exact_g = specified(z_s, z_t, None, None, weights, **PLAIN)
    torch.testing.assert_close(statistics, exact_statistics.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g, exact_g.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("bias_s", "bias_t", "cap_s", "cap_t"),
    [flags for flags in itertools.product([False, True], repeat=4) if any(flags)],
)
def test_transforms(bias_s, bias_t, cap_s, cap_t):
    z_s, z_t, b_s, b_t, weights = inputs(2, 600)
    options = {
        "scale_s": 0.5, "scale_t": 1.5, "softcap_s": 4.0 if cap_s else None,
        "softcap_t": 7.0 if cap_t else None, "temperature": 0.7,
    }  # fmt: skip
    arguments = (z_s, z_t, b_s if bias_s else None, b_t if bias_t else None, weights)
    statistics, g = launched(*arguments, **options)
    exact_statistics, exact_g = specified(*arguments, **options)
    torch.testing.assert_close(statistics, exact_statistics.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g, exact_g.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spread", [3.0, 0.3, 0.03, 0.003, 3e-4])
def test_small_divergences_keep_their_digits(spread):
    z_s, z_t, _, _, weights = inputs(3, 1500, spread)
    statistics, g = launched(z_s, z_t, None, None, weights, **PLAIN)
    exact_statistics, exact_g = specified(z_s, z_t, None, None, weights, **PLAIN)
    torch.testing.assert_close(statistics[0], exact_statistics[0].float(), rtol=2e-3, atol=1e-9)
    assert float((g - exact_g).norm() / exact_g.norm()) < 2e-3
    assert (statistics[0] >= 0).all()


def test_gradient_over_the_student_logits_and_without_statistics():
    z_s, z_t, _, _, weights = inputs(3, 1100)
    _, apart = launched(z_s, z_t, None, None, weights, all_statistics=False, **PLAIN)
    loss_only, none = launched(z_s, z_t, None, None, weights, gradient=False, **PLAIN)
    statistics = torch.zeros(5, 3, device=DEVICE)
    in_place = z_s.to(DEVICE)
    reverse_kl_rows.reverse_kl_rows(
        in_place,
        z_t.to(DEVICE),
        None,
        None,
        weights.to(DEVICE),
        statistics,
        in_place,
        all_statistics=False,
        **PLAIN,
    )
    assert torch.equal(in_place.cpu(), apart) and none is None
    torch.testing.assert_close(statistics[0].cpu(), loss_only[0], rtol=1e-6, atol=0)
    assert not statistics[1:].any()


def test_rows_of_a_wider_buffer_keep_their_neighbours():
    z_s, z_t, _, _, weights = inputs(2, 700)
    buffer = torch.full((2, 704), 9.0, device=DEVICE)
    reverse_kl_rows.reverse_kl_rows(
        z_s.to(DEVICE), z_t.to(DEVICE), None, None, weights.to(DEVICE), torch.zeros(5, 2, device=DEVICE),
        buffer[:, :700], all_statistics=False, **PLAIN,
    )  # fmt: skip
    assert (buffer[:, 700:] == 9).all()


def test_logits_of_another_dtype_or_layout_are_refused():
    z_s, z_t, _, _, weights = inputs(2, 64)
    for wrong in (z_s.double(), z_s.T.contiguous().T):
        with pytest.raises(ValueError, match="z_s"):
            launched(wrong, z_t, None, None, weights, **PLAIN)


def test_a_nan_in_one_row_leaves_the_others_alone():
    """In plain PyTorch a block looks once whether any probability underflows; a NaN must not answer for it."""
    z_s, z_t, _, _, weights = inputs(2, 64)
    z_s[0, 3] = float("nan")
    z_s[1, 5], z_t[1, 6] = -300.0, 300.0
    statistics, g = specified(z_s, z_t, None, None, weights, **PLAIN)
    alone, g_alone = specified(z_s[1:], z_t[1:], None, None, weights[1:], **PLAIN)
    assert statistics[0, 0].isnan()
    assert torch.equal(statistics[:, 1:], alone) and torch.equal(g[1:], g_alone)
    floats, scratch = torch.zeros(5, 2), torch.empty(3, 2, 64)
    z = z_s.clone()
    reference.reverse_kl_rows(
        z, z_t.clone(), None, None, weights, floats, z, all_statistics=True, scratch=scratch, **PLAIN
    )
    torch.testing.assert_close(floats[:, 1], alone[:, 0].float(), rtol=1e-4, atol=1e-5)
    assert z[1].isfinite().all()

"""The C++ row kernel against its executable specification in float64, at every instruction set this CPU has."""

import itertools

import pytest
import torch

from opcd_fast.kernels.csrc import native
from opcd_fast.kernels.reference import divergences as divergence_rows
from opcd_fast.kernels.reference import reverse_kl as reference

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the CPU library is {native.status()}")
LEVELS = native.supported_levels() if native.available() else ()
PLAIN = {"scale_s": 1.0, "scale_t": 1.0, "softcap_s": None, "softcap_t": None, "temperature": 1.0}
# A NaN all of whose bits are set: rounding it to bf16 by an addition would make it a zero.
PAYLOAD = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
DIVERGENCES = [
    ("reverse_kl", 0.0), ("forward_kl", 0.0), ("jsd", 0.5), ("jsd", 0.1), ("skew_reverse_kl", 0.1),
    ("skew_reverse_kl", 0.6), ("skew_forward_kl", 0.1), ("skew_forward_kl", 0.6),
]  # fmt: skip
CAPPED = {"scale_s": 0.5, "scale_t": 1.5, "softcap_s": 4.0, "softcap_t": 7.0, "temperature": 0.7}


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("OPCD_NATIVE_LEVEL", request.param)
    return request.param


def specified(z_s, z_t, bias_s=None, bias_t=None, weights=None, **options):
    """The reference on float64 copies."""
    z_s, z_t, weights = z_s.double(), z_t.double(), weights.double()
    statistics, g = torch.zeros(5, len(z_s), dtype=torch.float64), torch.empty_like(z_s)
    scratch = torch.empty(reference.scratch_planes(options["softcap_s"]), 2, z_s.shape[1], dtype=torch.float64)
    bias_s, bias_t = (None if bias is None else bias.double() for bias in (bias_s, bias_t))
    reference.reverse_kl_rows(
        z_s, z_t, bias_s, bias_t, weights, statistics, g, all_statistics=True, scratch=scratch, **options
    )
    return statistics, g


def computed(z_s, z_t, bias_s=None, bias_t=None, weights=None, all_statistics=True, dtype=torch.float32, **options):
    """The kernel, whose logits must survive."""
    before = z_s.clone(), z_t.clone()
    statistics, g = torch.zeros(5, len(z_s)), torch.full(z_s.shape, 7.0, dtype=dtype)
    native.reverse_kl_rows(z_s, z_t, bias_s, bias_t, weights, statistics, g, all_statistics=all_statistics, **options)
    for z, old in zip((z_s, z_t), before):
        torch.testing.assert_close(z, old, rtol=0, atol=0, equal_nan=True)
    return statistics, g


def inputs(rows, columns, spread=0.3, dtype=torch.float32):
    g = torch.Generator().manual_seed(columns)
    z_s = torch.randn(rows, columns, generator=g) * 3
    z_t = z_s + spread * torch.randn(rows, columns, generator=g)
    return z_s.to(dtype), z_t.to(dtype), torch.rand(rows, generator=g)


def agree(found, exact):
    torch.testing.assert_close(found[0], exact[0].float(), rtol=1e-5, atol=2e-7, equal_nan=True)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=2e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("columns", [1, 2, 3, 15, 16, 17, 511, 1023, 1024, 1025, 4097])
def test_every_remainder_of_the_block(level, columns):
    z_s, z_t, weights = inputs(3, columns)
    agree(computed(z_s, z_t, weights=weights, **PLAIN), specified(z_s, z_t, weights=weights, **PLAIN))


@pytest.mark.parametrize(("cap_s", "cap_t", "bias_s", "bias_t"), itertools.product([False, True], repeat=4))
def test_transforms(level, cap_s, cap_t, bias_s, bias_t):
    z_s, z_t, weights = inputs(2, 1100)
    biases = torch.randn(2, 1100, generator=torch.Generator().manual_seed(1))
    options = CAPPED | {"softcap_s": 4.0 if cap_s else None, "softcap_t": 7.0 if cap_t else None}
    arguments = (z_s, z_t, biases[0] if bias_s else None, biases[1] if bias_t else None, weights)
    found, exact = computed(*arguments, **options), specified(*arguments, **options)
    torch.testing.assert_close(found[0], exact[0].float(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spread", [2.0, 0.2, 0.02, 2e-3, 5e-4, 4e-5])  # KL from 1 to 1e-9
@pytest.mark.parametrize("columns", [700, 40000])
def test_small_divergences_keep_their_digits(level, spread, columns):
    z_s, z_t, weights = inputs(2, columns, spread)
    statistics, g = computed(z_s, z_t, weights=weights, **PLAIN)
    exact_statistics, exact_g = specified(z_s, z_t, weights=weights, **PLAIN)
    if spread < 1e-4:
        assert float(exact_statistics[0].max()) < 1e-8
    torch.testing.assert_close(statistics[0].double(), exact_statistics[0], rtol=1e-3, atol=0)
    assert float((g - exact_g).norm() / exact_g.norm()) < 1e-3
    assert (statistics[0] >= 0).all()


def test_a_softcap_keeps_the_digits_of_small_divergences(level):
    z_s, z_t, weights = inputs(3, 3000, 5e-4)
    options = PLAIN | {"softcap_s": 30.0, "softcap_t": 30.0}
    statistics, g = computed(z_s, z_t, weights=weights, **options)
    exact_statistics, exact_g = specified(z_s, z_t, weights=weights, **options)
    torch.testing.assert_close(statistics[0].double(), exact_statistics[0], rtol=3e-3, atol=0)
    assert float((g - exact_g).norm() / exact_g.norm()) < 2e-3


@pytest.mark.parametrize(("dtype_s", "dtype_t"), itertools.product([torch.float32, torch.bfloat16], repeat=2))
def test_bf16_logits_and_gradient(level, dtype_s, dtype_t):
    z_s, z_t, weights = inputs(3, 1061)
    z_s, z_t = z_s.to(dtype_s), z_t.to(dtype_t)
    exact = specified(z_s, z_t, weights=weights, **PLAIN)
    agree(computed(z_s, z_t, weights=weights, **PLAIN), exact)
    _, g = computed(z_s, z_t, weights=weights, dtype=torch.bfloat16, **PLAIN)
    torch.testing.assert_close(g.double(), exact[1], rtol=2**-8 + 1e-4, atol=1e-7)
    float_gradient = computed(z_s, z_t, weights=weights, **PLAIN)[1]
    assert torch.equal(g, float_gradient.bfloat16()), "not rounded to nearest even"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [37, 2048, 2100])
def test_in_place(level, dtype, columns):
    z_s, z_t, weights = inputs(3, columns, dtype=dtype)
    _, apart = computed(z_s, z_t, weights=weights, dtype=dtype, **PLAIN)
    native.reverse_kl_rows(z_s, z_t, None, None, weights, torch.zeros(5, 3), z_s, all_statistics=True, **PLAIN)
    assert torch.equal(z_s, apart)


def test_statistics_only_and_fewer_statistics(level):
    z_s, z_t, weights = inputs(3, 1100)
    full, _ = computed(z_s, z_t, weights=weights, **PLAIN)
    few, _ = computed(z_s, z_t, weights=weights, all_statistics=False, **PLAIN)
    alone = torch.zeros(5, 3)
    native.reverse_kl_rows(z_s, z_t, None, None, weights, alone, None, all_statistics=True, **PLAIN)
    torch.testing.assert_close(alone, full, rtol=1e-6, atol=0)
    torch.testing.assert_close(few[0], full[0], rtol=0, atol=0)
    assert not few[1:].any()


def test_rows_and_planes_of_wider_buffers_keep_their_neighbours(level):
    z_s, z_t, weights = inputs(3, 701)
    wide_s, wide_t, wide_g = torch.full((3, 768), 9.0), torch.full((3, 710), 9.0), torch.full((3, 705), 9.0)
    wide_s[:, :701], wide_t[:, :701] = z_s, z_t
    planes = torch.full((5, 8), 9.0)
    native.reverse_kl_rows(
        wide_s[:, :701], wide_t[:, :701], None, None, weights, planes[:, 2:5], wide_g[:, :701],
        all_statistics=True, **PLAIN,
    )  # fmt: skip
    statistics, g = computed(z_s, z_t, weights=weights, **PLAIN)
    assert torch.equal(wide_g[:, :701], g) and (wide_g[:, 701:] == 9).all()
    assert torch.equal(planes[:, 2:5], statistics)
    assert (planes[:, :2] == 9).all() and (planes[:, 5:] == 9).all()


def test_minus_infinity_and_very_negative_logits(level):
    z_s, z_t, weights = inputs(6, 1050)
    weights += 0.1
    z_s[0, 10:900] = z_t[0, 10:900] = -torch.inf  # no such tokens
    z_s[1, 1000:] = -torch.inf  # only the student rules them out
    z_t[2, 1049] = -torch.inf  # the teacher forbids what the student may say
    z_s[3, 7] = z_t[3, 7] = torch.finfo(torch.float32).min
    z_s[4, 7], z_t[4, 7] = -300.0, -torch.inf  # forbidden, but the student cannot say it either
    z_t[5, :400] = -200.0  # the terms p l dominate
    statistics, g = computed(z_s, z_t, weights=weights, **PLAIN)
    # In float64 a student's e^-300 is no underflow; in float32, as in the reference on float32, it counts as 0.
    z_s[4, 7] = -torch.inf
    exact_statistics, exact_g = specified(z_s, z_t, weights=weights, **PLAIN)
    agree((statistics, g), (exact_statistics, exact_g))
    assert statistics[0, 2] == torch.inf and not g[2].any() and g[1].any() and g[4].any()
    assert statistics[0, [0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(("column", "value"), [(0, torch.nan), (1060, PAYLOAD), (500, torch.inf)])
def test_nan_and_infinity_propagate_in_their_row_alone(level, side, column, value):
    z_s, z_t, weights = inputs(3, 1061)
    clean = computed(z_s, z_t, weights=weights, **PLAIN)
    (z_s if side == "student" else z_t)[1, column] = value
    for dtype in (torch.float32, torch.bfloat16):
        statistics, g = computed(z_s, z_t, weights=weights, dtype=dtype, **PLAIN)
        assert statistics[0, 1].isnan() and g[1].isnan().all()
        assert statistics[2 if side == "student" else 3, 1].isnan()
        assert torch.equal(statistics[:, ::2], clean[0][:, ::2])
        assert torch.equal(g[::2], clean[1][::2].to(dtype))


def test_a_side_of_minus_infinity_alone_is_not_a_number(level):
    z_s, z_t, weights = inputs(2, 40)
    z_t[0] = -torch.inf
    z_s[1] = -torch.inf
    statistics, g = computed(z_s, z_t, weights=weights, **PLAIN)
    assert statistics[0].isnan().all() and g.isnan().all()


def test_the_top_token_is_the_first_of_the_largest(level):
    z_s, z_t = torch.zeros(4, 3000), torch.zeros(4, 3000)
    z_s[0, 2500] = z_t[0, 2500] = 1.0
    z_s[1, 10] = z_t[1, 2000] = 1.0
    z_s[2, [50, 2200]] = z_t[2, 50] = 1.0
    z_s[3], z_t[3] = -50.0, -60.0
    statistics, _ = computed(z_s, z_t, weights=torch.ones(4), **PLAIN)
    assert statistics[4].tolist() == [1.0, 0.0, 1.0, 1.0]


def test_the_number_of_threads_changes_no_bit(level):
    z_s, z_t, weights = inputs(37, 1500)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(computed(z_s, z_t, weights=weights, **PLAIN))
    finally:
        torch.set_num_threads(before)
    for statistics, g in found[1:]:
        assert torch.equal(statistics, found[0][0]) and torch.equal(g, found[0][1])
    agree(found[0], specified(z_s, z_t, weights=weights, **PLAIN))


def test_no_rows():
    native.reverse_kl_rows(
        torch.empty(0, 5), torch.empty(0, 5), None, None, torch.empty(0), torch.empty(5, 0), torch.empty(0, 5),
        all_statistics=True, **PLAIN,
    )  # fmt: skip


def test_wrong_tensors_are_refused():
    z_s, z_t, weights = inputs(4, 64)
    bias = torch.zeros(64)
    good = [z_s, z_t, bias, bias, weights, torch.zeros(5, 4), torch.empty(4, 64)]
    wrong = {
        "z_s": [z_s.double(), z_s.T.contiguous().T, z_s.half()], "z_t": [z_t[:, :63], z_t[:3]],
        "bias_s": [bias.bfloat16(), bias[:5]], "bias_t": [torch.zeros(128)[::2]],
        "row_weights": [weights.double(), torch.zeros(8)[::2]], "statistics": [torch.zeros(4, 5).T, torch.zeros(4, 4)],
        "gradient": [torch.empty(4, 64, dtype=torch.half), torch.empty(4, 128)[:, ::2]],
    }  # fmt: skip
    for position, (name, values) in enumerate(wrong.items()):
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} is "):
                native.reverse_kl_rows(*good[:position], value, *good[position + 1 :], all_statistics=True, **PLAIN)


@pytest.fixture(params=DIVERGENCES, ids=lambda choice: f"{choice[0]}-{choice[1]}")
def choice(request):
    return {"divergence": request.param[0], "parameter": request.param[1]}


def specified_divergence(z_s, z_t, bias_s=None, bias_t=None, weights=None, **options):
    statistics, g = torch.zeros(5, len(z_s), dtype=torch.float64), torch.empty(z_s.shape, dtype=torch.float64)
    bias_s, bias_t = (None if bias is None else bias.double() for bias in (bias_s, bias_t))
    divergence_rows.divergence_rows(
        z_s.double(), z_t.double(), bias_s, bias_t, weights.double(), statistics, g, all_statistics=True, **options
    )
    return statistics, g


def computed_divergence(z_s, z_t, bias_s=None, bias_t=None, weights=None, dtype=torch.float32, **options):
    statistics, g = torch.zeros(5, len(z_s)), torch.full(z_s.shape, 7.0, dtype=dtype)
    native.divergence_rows(z_s, z_t, bias_s, bias_t, weights, statistics, g, all_statistics=True, **options)
    return statistics, g


@pytest.mark.parametrize("columns", [1, 3, 17, 1025, 3001])
def test_divergences(level, choice, columns):
    z_s, z_t, weights = inputs(3, columns, spread=1.5)
    exact = specified_divergence(z_s, z_t, weights=weights, **PLAIN, **choice)
    found = computed_divergence(z_s, z_t, weights=weights, **PLAIN, **choice)
    agree(found, exact)
    alone = torch.zeros(5, 3)
    native.divergence_rows(z_s, z_t, None, None, weights, alone, None, all_statistics=True, **PLAIN, **choice)
    torch.testing.assert_close(alone, found[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("spread", "shift"), [(2.0, 4.0), (0.02, 4.0), (1e-3, 4.0), (4e-6, 0.0)])
def test_small_divergences_of_every_kind_keep_their_digits(level, choice, spread, shift):
    if choice["divergence"] == "forward_kl" and spread == 4e-6:
        spread = 2e-4  # with its moment of exactly 0 it cannot cancel the rounding of the normalisers
    z_s, z_t, weights = inputs(2, 1500, spread)
    z_t += shift  # of all logits: no difference, but for the digits that z_s - z_t loses to it
    statistics, g = computed_divergence(z_s, z_t, weights=weights, **PLAIN, **choice)
    exact_statistics, exact_g = specified_divergence(z_s, z_t, weights=weights, **PLAIN, **choice)
    torch.testing.assert_close(statistics[0].double(), exact_statistics[0], rtol=3e-3, atol=0)
    assert float((g - exact_g).norm() / exact_g.norm()) < 2e-3


def test_divergences_with_transforms_in_place_and_in_bf16(level, choice):
    z_s, z_t, weights = inputs(2, 1100, 1.0)
    z_s, z_t = z_s.bfloat16(), z_t.bfloat16()
    bias = torch.randn(1100, generator=torch.Generator().manual_seed(1))
    exact = specified_divergence(z_s, z_t, bias, bias, weights, **CAPPED, **choice)
    torch.testing.assert_close(
        computed_divergence(z_s, z_t, bias, bias, weights, **CAPPED, **choice)[1].double(),
        exact[1],
        rtol=1e-4,
        atol=1e-7,
    )
    statistics = torch.zeros(5, 2)
    native.divergence_rows(z_s, z_t, bias, bias, weights, statistics, z_s, all_statistics=True, **CAPPED, **choice)
    torch.testing.assert_close(statistics, exact[0].float(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(z_s.double(), exact[1], rtol=2**-8 + 1e-4, atol=1e-7)


def test_divergences_where_probabilities_underflow(level, choice):
    z_s, z_t, weights = inputs(6, 1050)
    weights += 0.1
    z_s[0, 10:900] = z_t[0, 10:900] = -torch.inf  # no such tokens
    z_s[1, 3], z_t[2, 1049] = -torch.inf, -torch.inf
    z_s[3, 7] = z_t[3, 7] = torch.finfo(torch.float32).min
    z_s[4, :400], z_t[5, :400] = -200.0, -200.0
    statistics, g = computed_divergence(z_s, z_t, weights=weights, **PLAIN, **choice)
    exact_statistics, exact_g = specified_divergence(z_s, z_t, weights=weights, **PLAIN, **choice)
    torch.testing.assert_close(statistics, exact_statistics.float(), rtol=1e-5, atol=2e-7)
    torch.testing.assert_close(g.double(), exact_g, rtol=2e-5, atol=2e-7)
    infinite = {"reverse_kl": [2], "forward_kl": [1]}.get(choice["divergence"], [])
    assert statistics[0].isinf().nonzero().flatten().tolist() == infinite


def test_divergences_pass_nan_on(level, choice):
    for side in (0, 1):
        z = list(inputs(3, 1061)[:2])
        z[side][1, 500] = torch.nan
        statistics, g = computed_divergence(*z, weights=torch.ones(3), **PLAIN, **choice)
        assert statistics[0].isnan().tolist() == [False, True, False]
        assert g.isnan().all(-1).tolist() == [False, True, False] and g[::2].isfinite().all()


def test_parameters_next_to_the_ends_give_numbers(level, choice):
    z_s, z_t, weights = inputs(2, 300, 30.0)
    for parameter in (1e-9, 1 - 1e-9):
        statistics, g = computed_divergence(
            z_s, z_t, weights=weights, **PLAIN, divergence=choice["divergence"], parameter=parameter
        )
        assert statistics[0].isfinite().all() and (statistics[0] >= 0).all() and g.isfinite().all()


def test_an_unknown_divergence_or_parameter_is_refused():
    z_s, z_t, weights = inputs(1, 8)
    for divergence, parameter in (("hellinger", 0.5), ("jsd", 0.0), ("skew_forward_kl", 1.0)):
        with pytest.raises(ValueError, match=divergence):
            computed_divergence(z_s, z_t, weights=weights, **PLAIN, divergence=divergence, parameter=parameter)


def test_a_divergence_that_the_library_does_not_know_is_not_another_one(level, monkeypatch):
    """One that was added to the specification alone."""
    monkeypatch.setattr(divergence_rows, "DIVERGENCES", (*divergence_rows.DIVERGENCES, "hellinger"))
    z_s, z_t, weights = inputs(2, 8)
    with pytest.raises(RuntimeError, match="divergence_rows failed with code 2"):
        computed_divergence(z_s, z_t, weights=weights, **PLAIN, divergence="hellinger", parameter=0.5)

"""The dual-accumulator kernels and their twin against the row operation's specification in float64."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
from opcd_fast.kernels import dual_projection, dual_rows, linear_statistics, reference, reference_dual  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = {"scale_s": 1.0, "scale_t": 1.0, "softcap_s": None, "softcap_t": None, "temperature": 1.0}


def heads(rows, width, vocabulary, spread=0.3, shared=True, width_t=None, seed=0, dtype=torch.float32):
    """(h_s, w_s, h_t, w_t), logits of size about 3, the teacher `spread` away."""
    g = torch.Generator().manual_seed(seed + vocabulary)
    h_s = torch.randn(rows, width, generator=g)
    w_s = 3 * torch.randn(vocabulary, width, generator=g) / width**0.5
    if shared:
        h_t, w_t = h_s + spread * torch.randn(rows, width, generator=g), w_s
    else:
        h_t = torch.randn(rows, width_t or width, generator=g)
        w_t = 3 * torch.randn(vocabulary, width_t or width, generator=g) / h_t.shape[1] ** 0.5
    w_s = w_s.to(DEVICE, dtype)
    return h_s.to(DEVICE, dtype), w_s, h_t.to(DEVICE, dtype), w_s if shared else w_t.to(DEVICE, dtype)


def exact(h_s, w_s, h_t, w_t, bias_s, bias_t, weights, **options):
    """Statistics and G of the specification, from float64 logits."""
    z_s, z_t = (h.double() @ w.double().T for h, w in ((h_s, w_s), (h_t, w_t)))
    return specified(z_s, z_t, bias_s, bias_t, weights, **options)


def specified(z_s, z_t, bias_s, bias_t, weights, **options):
    z_s, z_t = z_s.clone(), z_t.clone()
    statistics, g = torch.zeros(5, len(z_s), dtype=z_s.dtype, device=z_s.device), torch.empty_like(z_s)
    planes = reference.scratch_planes(options["softcap_s"])
    scratch = torch.empty(planes, len(z_s), z_s.shape[1], dtype=z_s.dtype, device=z_s.device)
    bias_s, bias_t = (None if bias is None else bias.to(z_s.dtype) for bias in (bias_s, bias_t))
    reference.reverse_kl_rows(
        z_s, z_t, bias_s, bias_t, weights.to(z_s.dtype), statistics, g, all_statistics=True, scratch=scratch, **options
    )
    return statistics, g


def pitch_of(columns):
    return -(-columns // 64) * 64


def dual(
    h_s,
    w_s,
    h_t,
    w_t,
    bias_s,
    bias_t,
    weights,
    all_statistics=True,
    twin=False,
    exactly=False,
    in_place=False,
    g_dtype=None,
    **options,
):
    """Statistics (5, n) and G (n, pitch) of the kernels, or of their twin; `exactly`: the twin without rounding."""
    n, v, d = len(h_s), len(w_s), h_s.device
    kind, wide = (torch.float64, torch.float64) if exactly else (torch.float16, torch.float32)
    out = torch.full((2, n + 1, pitch_of(v)), 7.0, dtype=kind, device=d)
    planes = reference_dual.tile_planes(True, all_statistics)
    tiles = torch.full((planes, reference_dual.tile_count(v), n), 7.0, dtype=wide, device=d)
    projection = (reference_dual if twin or exactly else dual_projection).dual_projection
    gradient = (reference_dual if twin or exactly else dual_rows).dual_gradient
    out_s, out_d = out[:, :n]
    projection(h_s, w_s, h_t, w_t, bias_s, bias_t, out_s, out_d, tiles, all_statistics=all_statistics, **options)
    statistics = torch.zeros(5, n, dtype=wide, device=d)
    g = out_s if in_place else torch.full((n, pitch_of(v)), 7.0, dtype=g_dtype or wide, device=d)
    gradient(
        out_s, out_d, tiles, weights.to(wide), statistics, g, scale_s=options["scale_s"],
        softcap_s=options["softcap_s"], temperature=options["temperature"], all_statistics=all_statistics,
    )  # fmt: skip
    assert (out[:, n] == 7).all() and not g[:, v:].nan_to_num().any()  # no row beside, no column beyond
    return statistics, g[:, :v]


def only_statistics(h_s, w_s, h_t, w_t, bias_s, bias_t, all_statistics=True, twin=False, **options):
    statistics = torch.zeros(5, len(h_s), device=h_s.device)
    linear_statistics.linear_statistics(
        h_s, w_s, h_t, w_t, bias_s, bias_t, statistics, all_statistics=all_statistics,
        projection=reference_dual.dual_projection if twin else None, **options,
    )  # fmt: skip
    return statistics


def error(value, truth):
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def agree(found, truth, rtol=1e-3):
    (statistics, g), (true_statistics, true_g) = found, truth
    torch.testing.assert_close(statistics.double(), true_statistics.double(), rtol=rtol, atol=2e-6)
    assert error(g, true_g) < rtol


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize(("bias", "cap"), itertools.product([False, True], repeat=2))
def test_the_formulas_are_exact(bias, cap, spread):
    inputs = [x.double() for x in heads(5, 40, 300, spread)]
    inputs += list(torch.randn(2, 300, dtype=torch.float64)) if bias else [None, None]
    weights = torch.rand(5, dtype=torch.float64)
    options = {
        "scale_s": 0.5, "scale_t": 0.6, "softcap_s": 4.0 if cap else None, "softcap_t": 7.0 if cap else None,
        "temperature": 0.7,
    }  # fmt: skip
    statistics, g = dual(*inputs, weights, exactly=True, **options)
    true_statistics, true_g = exact(*inputs, weights, **options)
    torch.testing.assert_close(statistics, true_statistics, rtol=1e-7, atol=1e-14)
    torch.testing.assert_close(g, true_g, rtol=1e-9, atol=1e-15)


# float32 blocks are 32 wide in K: 64 is whole blocks, 72 and 20 leave a remainder.
@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "shared", "width_t"),
    [
        (1, 64, 128, True, None), (65, 72, 129, True, None), (3, 20, 255, True, None), (2, 36, 1100, True, None),
        (3, 64, 300, False, 40), (65, 20, 129, False, 20),  (2, 24, 5, False, 52),
    ],
)  # fmt: skip
def test_every_remainder(rows, width, vocabulary, shared, width_t, major, monkeypatch):
    """Through pointers (sm_80) and through tensor descriptors (sm_90)."""
    if DEVICE == "cpu":
        monkeypatch.setattr(dual_projection, "_major_capability", lambda device: major)
    inputs = (*heads(rows, width, vocabulary, shared=shared, width_t=width_t), None, None)
    weights = torch.rand(rows, device=DEVICE)
    truth = exact(*inputs, weights, **PLAIN)
    agree(dual(*inputs, weights, **PLAIN), truth, rtol=1e-3 if shared else 3e-3)  # KL is 8 nats with two heads
    statistics = only_statistics(*inputs, all_statistics=False, **PLAIN)
    torch.testing.assert_close(statistics[0], truth[0][0].float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)))
def test_transforms(flags):
    h_s, w_s, h_t, w_t = heads(3, 24, 200)
    biases = torch.randn(2, 200).to(DEVICE)
    options = {
        "scale_s": 0.5, "scale_t": 1.5, "softcap_s": 4.0 if flags[2] else None,
        "softcap_t": 7.0 if flags[3] else None, "temperature": 0.7,
    }  # fmt: skip
    inputs = (h_s, w_s, h_t, w_t, biases[0] if flags[0] else None, biases[1] if flags[1] else None)
    weights = torch.rand(3, device=DEVICE)
    truth = exact(*inputs, weights, **options)
    agree(dual(*inputs, weights, **options), truth)
    agree(dual(*inputs, weights, twin=True, **options), truth)
    torch.testing.assert_close(only_statistics(*inputs, **options), truth[0].float(), rtol=1e-4, atol=1e-6)


def test_two_byte_inputs_without_other_statistics():
    """The launch with 128 rows, which only two-byte inputs and a plain epilogue have."""
    inputs = (*heads(130, 72, 140, dtype=torch.float16), None, None)
    weights = torch.rand(130, device=DEVICE)
    true_statistics, true_g = exact(*inputs, weights, **PLAIN)
    for twin in (False, True):
        statistics, g = dual(*inputs, weights, all_statistics=False, twin=twin, **PLAIN)
        alone = only_statistics(*inputs, all_statistics=False, twin=twin, **PLAIN)
        assert error(g, true_g) < 1e-3
        torch.testing.assert_close(statistics[0], true_statistics[0].float(), rtol=1e-3, atol=0)
        torch.testing.assert_close(alone[0], true_statistics[0].float(), rtol=1e-4, atol=0)
        assert not statistics[1:].any() and not alone[1:].any()


# Spreads that give a mean KL of about 1, 1e-1, 1e-2, 1e-3, 3e-5 with logits of standard deviation 3.
LEVELS = ((0.48, 1.0), (0.15, 1e-1), (0.047, 1e-2), (0.015, 1e-3), (2.6e-3, 3e-5))


@pytest.mark.parametrize(("spread", "level", "offset"), [*((*level, 0.0) for level in LEVELS), (*LEVELS[-1], 20.0)])
def test_gradient_as_good_as_from_float32_logits(spread, level, offset):
    """With G in bf16 on both sides; plain float16 logits are far from it at small divergences.

    offset: added to all of the teacher's logits, which changes nothing but what must cancel."""
    h_s, w, h_t, _ = heads(6, 48, 1500, spread)
    bias_t = torch.full((1500,), offset, device=DEVICE) if offset else None
    inputs, weights = (h_s, w, h_t, w, None, bias_t), torch.ones(6, device=DEVICE)
    true_statistics, true_g = exact(*inputs, weights, **PLAIN)
    kl = float(true_statistics[0].mean())
    assert level / 2 < kl < level * 2

    def of_hidden(g):
        """Error of dH from a G rounded to bf16."""
        return error(g.bfloat16().double() @ w.double(), true_g @ w.double())

    z_s, z_t = h_s @ w.T, h_t @ w.T
    from_float32 = of_hidden(specified(z_s, z_t, None, None, weights, **PLAIN)[1])
    from_float16 = of_hidden(specified(z_s.half().float(), z_t.half().float(), None, None, weights, **PLAIN)[1])
    for twin in (False, True):
        statistics, g = dual(*inputs, weights, all_statistics=False, twin=twin, **PLAIN)
        assert of_hidden(g) <= 1.1 * from_float32
        torch.testing.assert_close(statistics[0], true_statistics[0].float(), rtol=1e-3, atol=0)
        assert error(only_statistics(*inputs, twin=twin, **PLAIN)[0], true_statistics[0]) < 5e-4
    assert from_float16 > (1.1 if level == 1.0 else 2.0) * from_float32


def test_gradient_over_the_student_logits():
    inputs, weights = (*heads(3, 40, 2100), None, None), torch.rand(3, device=DEVICE)
    apart = dual(*inputs, weights, all_statistics=False, g_dtype=torch.float16, **PLAIN)
    over = dual(*inputs, weights, all_statistics=False, in_place=True, **PLAIN)
    assert torch.equal(apart[0], over[0]) and torch.equal(apart[1], over[1])


def test_forbidden_tokens():
    """-inf in the biases: 0 and 1 both sides, 2 the student alone, tile 1 the student alone and tile 2 both."""
    h_s, w_s, h_t, w_t = heads(3, 24, 500)
    bias_s, bias_t = torch.full((2, 500), -20.0, device=DEVICE)  # all logits negative: 0 stands for a forbidden tile
    bias_s[:3] = bias_s[128:384] = bias_t[:2] = bias_t[256:384] = -torch.inf
    inputs, weights = (h_s, w_s, h_t, w_t, bias_s, bias_t), torch.rand(3, device=DEVICE)
    truth = exact(*inputs, weights, **PLAIN)
    assert truth[0].isfinite().all()
    for twin in (False, True):
        agree(dual(*inputs, weights, twin=twin, **PLAIN), truth, rtol=1e-2)  # q of token 2 through a float16 difference
        statistics = only_statistics(*inputs, twin=twin, **PLAIN)
        torch.testing.assert_close(statistics, truth[0].float(), rtol=1e-4, atol=1e-6)

    bias_t[400] = -torch.inf  # the student may say it: no finite KL, gradient 0, everything else stays
    true_statistics, true_g = exact(*inputs, weights, **PLAIN)
    assert true_statistics[0].isinf().all() and not true_g.any()
    for twin in (False, True):
        statistics, g = dual(*inputs, weights, twin=twin, **PLAIN)
        assert not g.any()
        alone = only_statistics(*inputs, twin=twin, **PLAIN)
        for found in (statistics, alone):
            torch.testing.assert_close(found, true_statistics.float(), rtol=1e-4, atol=1e-5)


def test_nan_stays_in_its_row():
    h_s, w_s, h_t, w_t = heads(4, 24, 200)
    h_s[1, 3], h_t[2, 5] = torch.nan, torch.nan
    inputs, weights = (h_s, w_s, h_t, w_t, None, None), torch.rand(4, device=DEVICE)
    for twin in (False, True):
        statistics, g = dual(*inputs, weights, twin=twin, **PLAIN)
        alone = only_statistics(*inputs, twin=twin, **PLAIN)
        for kl in (statistics[0], alone[0]):
            assert kl.isnan().tolist() == [False, True, True, False]
        assert g.isnan().all(1).tolist() == [False, True, True, False]


def test_distant_models_stay_finite():
    """Logits hundreds apart: p and q underflow, the KL is far beyond what its exponential form can hold."""
    h_s, w_s, h_t, w_t = heads(4, 24, 300, shared=False)
    inputs, weights = (60 * h_s, w_s, 60 * h_t, w_t, None, None), torch.rand(4, device=DEVICE)
    true_statistics, true_g = exact(*inputs, weights, **PLAIN)
    assert (true_statistics[0] > 100).any()
    for twin in (False, True):
        statistics, g = dual(*inputs, weights, twin=twin, **PLAIN)
        alone = only_statistics(*inputs, twin=twin, **PLAIN)
        # p is 1 for one token almost everywhere: the gradient is a difference of numbers of size 500.
        assert (g - true_g).abs().max() < 2e-3
        for found in (statistics, alone):
            assert ((found[0] > 79) | (found[0] > 0.99 * true_statistics[0])).all() and found[0].isfinite().all()
            torch.testing.assert_close(found[1:], true_statistics[1:].float(), rtol=1e-3, atol=1e-5)


def test_statistics_in_chunks_of_rows():
    inputs = (*heads(300, 16, 140), None, None)
    statistics = torch.zeros(5, 300, device=DEVICE)
    one_chunk = only_statistics(*inputs, **PLAIN)
    sizes = []

    def projection(h_s, *rest, **options):
        sizes.append(len(h_s))
        dual_projection.dual_projection(h_s, *rest, **options)

    row_bytes = 4 * 2 * (9 + linear_statistics.MERGE_PLANES)
    linear_statistics.linear_statistics(
        *inputs, statistics, all_statistics=True, projection=projection, scratch_bytes=200 * row_bytes, **PLAIN
    )
    assert sizes == [128, 128, 44]
    torch.testing.assert_close(statistics, one_chunk, rtol=1e-6, atol=1e-7)


def test_no_rows():
    inputs, weights = (*heads(0, 16, 140), None, None), torch.rand(0, device=DEVICE)
    statistics, g = dual(*inputs, weights, **PLAIN)
    assert statistics.shape == (5, 0) and g.shape == (0, 140)
    assert only_statistics(*inputs, **PLAIN).shape == (5, 0)


def test_what_does_not_fit_is_refused():
    h_s, w_s, h_t, w_t = heads(3, 16, 140)
    out = torch.empty(2, 3, 192, dtype=torch.float16, device=DEVICE)
    tiles = torch.empty(3, 2, 3, device=DEVICE)

    def refused(match, h_s=h_s, bias=None, out_s=out[0], tiles=tiles):
        with pytest.raises(ValueError, match=match):
            dual_projection.dual_projection(
                h_s, w_s, h_t, w_t, bias, None, out_s, out[1], tiles, all_statistics=False, **PLAIN
            )

    refused("student: h is", h_s=h_s.double())
    refused("student: h has shape", h_s=h_s[:, :8])
    refused("multiples of 16 bytes", h_s=torch.zeros(3, 18, device=DEVICE)[:, :16])
    refused("bias_s", bias=torch.zeros(139, device=DEVICE))
    refused("out_s is", out_s=out[0].float())
    refused("out_s is", out_s=out[0, :, :141])
    refused("both be None", out_s=None)
    refused("tiles is", tiles=tiles[:2])
    with pytest.raises(ValueError, match="gradient has shape"):
        dual_rows.dual_gradient(
            out[0], out[1], tiles, h_s[:, 0], torch.zeros(5, 3, device=DEVICE), torch.empty(3, 140, device=DEVICE),
            scale_s=1.0, softcap_s=None, temperature=1.0, all_statistics=False,
        )  # fmt: skip

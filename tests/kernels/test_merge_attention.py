"""Merging attention over disjoint key sets, in PyTorch and in Triton, against one softmax over their union in fp64."""

import pytest
import torch

from opcd_fast.kernels.reference import attention as specification

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
# Of each element against fp64, from inputs that were rounded to the dtype: one more rounding, half a unit in the last
# place and a little. Triton's interpreter cuts bf16 off instead of rounding, which is a whole unit.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 * (1.01 if DEVICE == "cuda" else 2.01), torch.float16: 2**-10.9}


@pytest.fixture(params=["torch", "triton"])
def merge(request):
    """One implementation of merge_attention."""
    if request.param == "torch":
        return specification.merge_attention
    pytest.importorskip("triton")
    from opcd_fast.kernels.triton import merge_attention

    return merge_attention


def problem(n, heads, width, dtype=torch.float32, level=0.0):
    """Two sets' attention as a kernel would give it, and sinks."""
    g = torch.Generator().manual_seed(n * heads + width)
    outs = [torch.randn(n, heads, width, generator=g).to(dtype) for _ in range(2)]
    lses = [3 * torch.randn(n, heads, generator=g) + level for _ in range(2)]
    return outs, lses, 2 * torch.randn(heads, generator=g) + level


def oracle(outs, lses, sink=None, has=(None, None)):
    """In fp64: (n, H, d) and (n, H)."""
    n, heads, width = outs[0].shape
    levels, values = [], []
    for out, lse, there in zip(outs, lses, has, strict=True):
        there = torch.ones(n, dtype=torch.bool) if there is None else there
        levels.append(torch.where(there[:, None], lse.double(), -INF))
        values.append(torch.where(there[:, None, None], out.double(), 0.0))
    if sink is not None:
        levels.append(sink.double().expand(n, heads))
        values.append(torch.zeros(n, heads, width, dtype=torch.float64))
    levels = torch.stack(levels)
    lse = levels.logsumexp(0)
    p = torch.where(levels == -INF, 0.0, (levels - lse).exp())
    return (p.unsqueeze(-1) * torch.stack(values)).sum(0), lse


def run(merge, outs, lses, sink=None, has=(None, None), **options):
    move = [None if x is None else x.to(DEVICE) for x in (*outs, *lses, sink, *has)]
    lse = torch.full(outs[0].shape[:2], 7.0, device=DEVICE)
    got = merge(
        move[0], move[2], move[1], move[3], sink=move[4], has_keys_a=move[5], has_keys_b=move[6], lse=lse, **options
    )
    return got.cpu(), lse.cpu()


def check(merge, outs, lses, sink=None, has=(None, None)):
    got, lse = run(merge, outs, lses, sink, has)
    expected, expected_lse = oracle(outs, lses, sink, has)
    assert got.dtype == outs[0].dtype
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[got.dtype], atol=3e-7)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "heads", "width"), [(1, 1, 1), (37, 3, 24), (5, 6, 64), (9, 2, 80), (70, 7, 128)])
@pytest.mark.parametrize("sinks", [False, True])
def test_odd_sizes(n, heads, width, dtype, sinks, merge):
    outs, lses, sink = problem(n, heads, width, dtype)
    check(merge, outs, lses, sink if sinks else None)


@pytest.mark.parametrize("level", [-500.0, 300.0])
def test_levels_whose_exponentials_overflow(level, merge):
    outs, lses, sink = problem(6, 3, 16, level=level)
    lses[1][0] += 80.0
    lses[1][1] -= 120.0
    got, _ = run(merge, outs, lses, sink)
    torch.testing.assert_close(got.double(), oracle(outs, lses, sink)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("value", [INF, -INF, 0.0, NAN])
def test_empty_sets_are_told_by_their_flag(value, sinks, merge):
    outs, lses, sink = problem(40, 3, 24)
    has = [torch.ones(40, dtype=torch.bool) for _ in range(2)]
    has[0][[0, 5, 39]], has[1][[1, 5, 20]] = False, False
    for out, lse, there in zip(outs, lses, has, strict=True):
        out[~there], lse[~there] = NAN, value
    check(merge, outs, lses, sink if sinks else None, has)
    check(merge, outs[:1] * 2, lses[:1] * 2, sink if sinks else None, (has[0], has[0]))
    got, lse = run(merge, outs, lses, None, has)
    assert not got[5].any() and (lse[5] == -INF).all()


@pytest.mark.parametrize("value", [INF, 0.0])
def test_the_value_alone_does_not_make_a_set_empty(value, merge):
    outs, lses, _ = problem(4, 2, 8)
    lses[0][1], lses[1][1] = value, -30.0
    got, _ = run(merge, outs, lses)
    if value == 0.0:
        torch.testing.assert_close(got[1], outs[0][1])
    else:
        assert got[1].isnan().all()  # a score that overflowed must not pass for an answer


def test_a_sink_alone(merge):
    outs, lses, sink = problem(11, 4, 20)
    lse = torch.empty(11, 4, device=DEVICE)
    got = merge(outs[0].to(DEVICE), lses[0].to(DEVICE), sink=sink.to(DEVICE).bfloat16(), lse=lse).cpu()
    rounded = sink.bfloat16().double()
    expected = outs[0].double() * (lses[0].double() - rounded).sigmoid().unsqueeze(-1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.cpu().double(), torch.logaddexp(lses[0].double(), rounded.expand(11, 4)))


def test_strides_and_in_place(merge):
    n, heads, width = 13, 3, 40
    outs, lses, sink = problem(n, heads, width, torch.bfloat16)
    plain, plain_lse = run(merge, outs, lses, sink)
    # As kernels return them: heads first, and inside of a buffer whose neighbours must survive.
    buffer = torch.full((heads, n + 2, width + 8), 9.0, dtype=torch.bfloat16, device=DEVICE)
    a = buffer[:, 1:-1, :width].transpose(0, 1)
    a.copy_(outs[0])
    b = outs[1].transpose(0, 2).contiguous().to(DEVICE).transpose(0, 2)  # no unit stride at all
    levels = [x.t().contiguous().to(DEVICE).t() for x in lses]
    got = merge(a, levels[0], b, levels[1], sink=sink.to(DEVICE), out=a, lse=levels[0])
    assert got.data_ptr() == a.data_ptr()
    assert torch.equal(a.cpu(), plain) and torch.equal(levels[0].cpu(), plain_lse)
    buffer[:, 1:-1, :width] = 9.0
    assert (buffer == 9.0).all()


def test_gradients_of_the_specification():
    outs, lses, sink = problem(5, 2, 3)
    inputs = [x.double().requires_grad_() for x in (outs[0], lses[0], outs[1], lses[1], sink)]
    has = torch.tensor([True, False, True, True, False])

    def function(out_a, lse_a, out_b, lse_b, sink):
        return specification.merge_attention(out_a, lse_a, out_b, lse_b, sink=sink, has_keys_a=has)

    assert torch.autograd.gradcheck(function, inputs)


def test_what_the_kernel_does_not_take():
    pytest.importorskip("triton")
    from opcd_fast.kernels.triton import merge_attention

    outs, lses, _ = problem(3, 2, 8)
    with pytest.raises(ValueError, match="lse_b is torch.float64"):
        merge_attention(outs[0], lses[0], outs[1], lses[1].double())
    with pytest.raises(ValueError, match="out has strides"):
        merge_attention(outs[0], lses[0], outs[1], lses[1], out=torch.empty(8, 2, 3).transpose(0, 2))
    assert merge_attention(outs[0][:0], lses[0][:0]).shape == (0, 2, 8)

"""Packed attention against a loop over sequences in float64."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import by_stretch, dense, double, make_prefixes, make_qkv, make_row

from opcd_fast.attention import PackedCall, backends, dispatch, kernels, packed_row
from opcd_fast.attention.dispatch import row_attention

SINK = torch.tensor([0.3, -2.0, 4.0, 0.0, 1.0, -9.0])
PARTS = [(None, None), (None, SINK), (2.0, None), (2.0, SINK)]  # softcap, sink
WINDOWS = [None, 4, 9, 22, 23, 28, 29]


def close(got, expected, atol=3e-6):
    torch.testing.assert_close(got, expected.to(got.dtype), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[5], [1], [4, 4, 4], [3, 1, 9, 2], [2, 0, 3]])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
def test_causal_varlen(lengths, heads):
    row = make_row(lengths)
    q, k, v = make_qkv(sum(lengths), heads=heads)
    expected = dense(*double(q, k, v), row, [], 0.25)
    close(row_attention(q, k, v, row, [], 0.25), expected)
    with_lse, lse = dispatch.causal_attention(q, k, v, row, 0.25, with_lse=True)
    close(with_lse, expected)
    assert lse.shape == (sum(lengths), heads[0]) and lse.dtype == torch.float32


@pytest.mark.parametrize(("softcap", "sink"), PARTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [([3, 1, 9, 2], [7, 0, 20]), ([3, 3, 3, 3], [0, 7, 20]), ([2, 0, 3, 1], [7, 20, 0]), ([4, 2], [])],
)
def test_groups_of_prefixes(lengths, sizes, window, softcap, sink):
    row = make_row(lengths, sizes, [1, 1, 2][: len(sizes)])
    q, k, v = make_qkv(sum(lengths))
    prefixes, options = make_prefixes(row, window), {"softcap": softcap, "sink": sink}
    got = row_attention(q, k, v, row, prefixes, 0.25, window, **options)
    close(got, dense(*double(q, k, v), row, double(*prefixes), 0.25, window, **options))
    if options != {"softcap": None, "sink": None}:
        assert (row_attention(q, k, v, row, prefixes, 0.25, window) - got).abs().max() > 0.05


@pytest.mark.parametrize(("softcap", "sink"), PARTS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sizes", [[], [5, 0], [0, 5]])
def test_gradients(sizes, window, softcap, sink):
    row = make_row([3, 1, 6], sizes, [1, 2][: len(sizes)])
    results = []
    # In fp32 too: there kernels would run whose backward forgets the logsumexp.
    for function, kind in ((dense, torch.float64), (row_attention, torch.float64), (row_attention, torch.float32)):
        leaves = [x.requires_grad_() for x in make_qkv(10, dtype=kind)]
        prefixes = make_prefixes(row, window, dtype=kind)
        leaves += [x.requires_grad_() for pair in prefixes for x in pair]
        options = {"softcap": softcap, "sink": None}
        if sink is not None:
            options["sink"] = sink.to(kind, copy=True).requires_grad_()
            leaves.append(options["sink"])
        function(*leaves[:3], row, prefixes, 0.25, window, **options).square().sum().backward()
        results.append([x.grad for x in leaves])
    for expected, in_double, in_single in zip(*results, strict=True):
        torch.testing.assert_close(in_double, expected, atol=1e-10, rtol=1e-9)
        torch.testing.assert_close(in_single.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("bounds", "tokens", "message"),
    [
        ([0, 3], 5, "cu_seqlens"),
        ([1, 5], 5, "cu_seqlens"),
        ([0, 4, 2, 5], 5, "cu_seqlens"),
        ([0.0, 5.0], 5, "cu_seqlens"),
        ([0, 0], 0, "no tokens"),
    ],
)
def test_malformed_rows(bounds, tokens, message):
    with pytest.raises(ValueError, match=message):
        packed_row(torch.tensor(bounds), tokens, torch.device("cpu"))


# --- the function that layers call --------------------------------------------------------------------------


class Layer(torch.nn.Module):
    layer_idx = 3


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_reads_its_prefix_and_is_counted(autocast):
    """Values narrower than keys, as in DeepSeek-V3; under autocast RoPE leaves keys in another type."""
    row = make_row([3, 4], [6], [2])
    q, k, v = make_qkv(7)
    ((before_k, before_v),) = make_prefixes(row)
    v, before_v = v[..., :10], before_v[..., :10]
    if autocast:
        v, before_v = v.bfloat16(), before_v.bfloat16()
    asked = []
    call = PackedCall(row, lambda layer, key: asked.append((layer.layer_idx, key)) or [(before_k, before_v)])
    got, _ = call.attend(Layer(), q, k, v, None, scaling=0.25)
    assert got.shape == (1, 7, 6, 10) and got.dtype == v.dtype
    expected = dense(*double(q, k, v), row, double((before_k, before_v)), 0.25)
    close(got[0], expected, atol=3e-2 if autocast else 3e-6)
    assert call.layers_done == {3} and asked[0][0] == 3 and asked[0][1] is k


@pytest.mark.parametrize(("kept", "window"), [(19, None), (21, None), (0, None), (19, 24), (8, 10)])
def test_a_prefix_of_another_length_is_an_error(kept, window):
    row = make_row([4], [20], [1])
    prefix = [tuple(torch.zeros(1, 2, kept, 16) for _ in range(2))]
    with pytest.raises(RuntimeError, match="layer 3 did not get its context"):
        PackedCall(row, lambda *_: prefix).attend(Layer(), *make_qkv(4), None, sliding_window=window)


def test_more_of_a_prefix_than_a_window_sees():
    row = make_row([4, 2, 3], [20, 5], [2, 1])
    prefixes, inputs = make_prefixes(row), make_qkv(9)
    got, _ = PackedCall(row, lambda *_: prefixes).attend(Layer(), *inputs, None, scaling=0.25, sliding_window=8)
    close(got[0], dense(*double(*inputs), row, double(*prefixes), 0.25, 8))


def test_what_a_layer_may_not_ask():
    call = PackedCall(make_row([2]))
    with pytest.raises(NotImplementedError, match="position_bias"):
        call.attend(Layer(), *make_qkv(2), None, position_bias=torch.zeros(1))
    with pytest.raises(RuntimeError, match="layer 3 got 2 queries and 5 keys for a row of 2 tokens"):
        call.attend(Layer(), *make_qkv(2, 5), None)
    assert not call.layers_done


# --- precision, and what a kernel is given ------------------------------------------------------------------


def single_pass(q, k, v, scale, softcap, sink):
    """One bf16 call over all keys of a sequence: torch's kernel; with a cap or a sink what tensor cores and eager
    attention do, which is scores and softmax in fp32, and the probabilities rounded to bf16 for the last product."""
    n, m = q.shape[2], k.shape[2]
    seen = torch.arange(m) <= torch.arange(m - n, m).unsqueeze(1)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if softcap is None and sink is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)[0].transpose(0, 1)
    scores = q.float() @ k.float().transpose(2, 3) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(1, -1, n, 1)], -1)
    p = scores.softmax(-1)[..., :m].bfloat16()
    return (p.float() @ v.float()).bfloat16()[0].transpose(0, 1)


@pytest.mark.parametrize(("softcap", "sink"), PARTS)
@pytest.mark.parametrize("past", [33, 512, 2048])
def test_bf16_is_as_good_as_one_pass(past, softcap, sink):
    row = make_row([40, 17, 33], [past], [3])
    q, k, v = make_qkv(90, d=64, dtype=torch.bfloat16)
    q = q * 0.5  # of unit variance, as the bound was measured
    (prefix,) = make_prefixes(row, d=64, dtype=torch.bfloat16)
    exact = dense(*double(q, k, v), row, double(prefix), 0.125, softcap=softcap, sink=sink)
    got = row_attention(q, k, v, row, [prefix], 0.125, softcap=softcap, sink=sink)
    assert got.dtype == torch.bfloat16
    single = torch.cat([
        single_pass(
            q[:, :, a:b], *(torch.cat([old, new[:, :, a:b]], 2) for old, new in zip(prefix, (k, v), strict=True)),
            0.125, softcap, sink,
        )
        for a, b in zip(row.bounds, row.bounds[1:], strict=False)
    ])  # fmt: skip
    error, of_one_pass = (((x.double() - exact).norm() / exact.norm()).item() for x in (got, single))
    assert error <= 1.25 * of_one_pass


@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("lengths", [[3, 1, 9, 2], [2, 0, 3, 1]])
@pytest.mark.parametrize("switch", [True, False])
def test_what_the_varlen_kernel_is_given(lengths, window, switch, monkeypatch):
    """The CUDA branch, with a stand-in that follows varlen_attn's documentation (logsumexp as (H, N)). In torch 2.11 it
    has no switch for shared heads, and shares them."""

    def stand_in(q, k, v, *bounds, return_aux, window_size, scale=None, **more):
        assert set(more) <= ({"enable_gqa"} if switch else set()) and window_size[1] == 0
        assert not switch or more.get("enable_gqa", False) == (q.shape[1] != k.shape[1])
        reach = None if window_size[0] < 0 else window_size[0] + 1
        out, lse = by_stretch(q, k, v, *bounds, scale or 1.0, window=reach)
        return (out, lse.t()) if return_aux is not None else out

    parameters = {"window_size", "scale", *(["enable_gqa"] if switch else [])}
    monkeypatch.setattr(kernels, "_varlen_parameters", lambda: parameters)
    assert kernels.varlen_ready()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(backends, "_varlen", lambda *_, **__: backends.Kernel("varlen", kernels.varlen_torch))
    kernels._lse_has_heads_first.cache_clear()
    for sizes in ([7, 0, 20], [0, 0, 0]):
        row = make_row(lengths, sizes, [1, 1, 2])
        # N = H is where the layout is ambiguous. The row keeps which keys a window needs, for all layers alike.
        for heads in ((6, 2), (6, 2), (sum(lengths), sum(lengths))):
            q, k, v = make_qkv(sum(lengths), heads=heads)
            prefixes = make_prefixes(row, window, heads[1])
            got = row_attention(q, k, v, row, prefixes, 0.25, window)
            close(got, dense(*double(q, k, v), row, double(*prefixes), 0.25, window))
    kernels._lse_has_heads_first.cache_clear()

"""Packed attention against a loop over sequences in float64."""

from __future__ import annotations

import pytest
import torch

from opcd_fast.attention import backends
from opcd_fast.attention import dispatch as attention
from opcd_fast.attention import kernels as attention_kernels
from opcd_fast.attention.dispatch import PackedRow, PrefixGroup, merge_by_logsumexp, packed_row, row_attention


def dense(query, key, value, row, counts, scale, window=None, softcap=None, sink=None):
    """The same with explicit scores; (1, H, N, d) -> (N, H, d). Groups' prefixes begin at their kept keys."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    starts, first = [], 0
    for count in counts:
        starts.append(first)
        first += count
    out, token = [], 0
    group_of = {
        s: (g, start, count)
        for g, start, count in zip(row.groups, starts, counts, strict=True)
        for s in range(g.first_sequence, g.end_sequence)
    }
    for sequence, length in enumerate(row.lengths):
        group, start, count = group_of.get(sequence, (None, 0, 0))
        places = [*range(start, start + count), *range(first + token, first + token + length)]
        k, v = key[0][:, places], value[0][:, places]
        scores = query[0, :, token : token + length] @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        at = torch.arange(count, count + length).unsqueeze(1)
        place = torch.arange(count + length)
        seen = place <= at
        if window is not None:
            seen &= place > at - window
        scores = scores.masked_fill(~seen, -torch.inf)
        if sink is not None:
            scores = torch.cat([scores, sink.to(scores).view(-1, 1, 1).expand(-1, length, 1)], -1)
        p = scores.softmax(-1)[..., : count + length]
        out.append((p @ v).transpose(0, 1))
        token += length
    return torch.cat(out)


def make_row(lengths, sizes=(), per_group=()):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    groups, sequence = [], 0
    for size, number in zip(sizes, per_group, strict=True):
        end = sequence + number
        groups.append(PrefixGroup(sequence, end, int(bounds[sequence]), int(bounds[end]), size))
        sequence = end
    return PackedRow(tuple(lengths), bounds.int(), tuple(groups))


def make_qkv(tokens, past=0, heads=(6, 2), d=16, dtype=torch.float32):
    torch.manual_seed(3)
    query = torch.randn(1, heads[0], tokens, d, dtype=torch.float64) * 2
    key, value = (torch.randn(1, heads[1], past + tokens, d, dtype=torch.float64) for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


@pytest.mark.parametrize("lengths", [[5], [1], [4, 4, 4], [3, 1, 9, 2], [2, 0, 3]])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
def test_causal_varlen(lengths, heads):
    row = make_row(lengths)
    q, k, v = make_qkv(sum(lengths), heads=heads)
    expected = dense(q.double(), k.double(), v.double(), row, [], 0.25)
    got = row_attention(q, k, v, row, [], 0.25)
    torch.testing.assert_close(got, expected.float(), atol=2e-6, rtol=1e-5)
    with_lse, lse = attention.causal_attention(q, k, v, row, 0.25, with_lse=True)
    torch.testing.assert_close(with_lse, expected.float(), atol=2e-6, rtol=1e-5)
    assert lse.shape == (sum(lengths), heads[0]) and lse.dtype == torch.float32


@pytest.mark.parametrize("window", [None, 4, 9, 22, 23, 28, 29])
@pytest.mark.parametrize("lengths", [[3, 1, 9, 2], [3, 3, 3, 3], [2, 0, 3, 1]])
def test_groups_of_prefixes(lengths, window):
    sizes = [7, 0, 20]
    kept = [s if window is None else min(s, window - 1) for s in sizes]
    row = make_row(lengths, sizes, [1, 1, 2])
    q, k, v = make_qkv(sum(lengths), sum(kept))
    expected = dense(q.double(), k.double(), v.double(), row, kept, 0.25, window)
    got = row_attention(q, k, v, row, kept, 0.25, window)
    torch.testing.assert_close(got, expected.float(), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_without_prefix(window):
    lengths = [3, 1, 6]
    row = make_row(lengths)
    inputs = [x.requires_grad_() for x in make_qkv(sum(lengths))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weight = torch.randn(sum(lengths), 6, 16)
    (row_attention(*inputs, row, [], 0.25, window) * weight).sum().backward()
    (dense(*exact, row, [], 0.25, window) * weight).sum().backward()
    for got, expected in zip(inputs, exact, strict=True):
        torch.testing.assert_close(got.grad, expected.grad.float(), atol=1e-5, rtol=1e-4)


def test_merge_is_exact_and_stable():
    torch.manual_seed(0)
    scores = torch.randn(5, 3, 20, dtype=torch.float64) * 4 + 300.0  # exp of it overflows fp32
    values = torch.randn(20, 8, dtype=torch.float64)
    parts = []
    for keys in (slice(0, 13), slice(13, 20)):
        part = scores[..., keys]
        parts += [(part.softmax(-1) @ values[keys]).float(), part.logsumexp(-1).float()]
    merged = merge_by_logsumexp(*parts)
    # lse of 300 has a spacing of 3e-5 in fp32, which bounds the weights
    torch.testing.assert_close(merged.double(), scores.softmax(-1) @ values, atol=1e-4, rtol=1e-4)


def test_window_needs_the_keys_it_reaches():
    row = make_row([4], [20], [1])
    q, k, v = make_qkv(4, 3)
    with pytest.raises(RuntimeError, match="kept 3 prefix keys"):
        row_attention(q, k, v, row, [3], 0.25, window=10)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 2, 5]])
def test_malformed_bounds(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"):
        packed_row(torch.tensor(bounds), 5, torch.device("cpu"))


def test_malformed_rows():
    with pytest.raises(ValueError, match="cu_seqlens"):
        packed_row(torch.tensor([0.0, 5.0]), 5, torch.device("cpu"))
    with pytest.raises(ValueError, match="no tokens"):
        packed_row(torch.tensor([0, 0]), 0, torch.device("cpu"))


def test_called_outside_of_a_row():
    q, k, v = make_qkv(2)
    with pytest.raises(RuntimeError, match="outside"):
        attention.attention_on_row(torch.nn.Identity(), q, k, v, None)


def test_biased_scores_are_refused():
    module = torch.nn.Identity()
    module.layer_idx = 0
    q, k, v = make_qkv(2)
    with (
        attention.running(attention.PackedCall(make_row([2]))),
        pytest.raises(NotImplementedError, match="position_bias"),
    ):
        attention.attention_on_row(module, q, k, v, None, position_bias=torch.zeros(1))


# --- capped scores and sinks --------------------------------------------------------------------------------

SINK = torch.tensor([0.3, -2.0, 4.0, 0.0, 1.0, -9.0])
PARTS = [(None, SINK), (2.0, None), (2.0, SINK)]


@pytest.mark.parametrize(("softcap", "sink"), PARTS)
@pytest.mark.parametrize("window", [None, 4, 9, 23, 29])
@pytest.mark.parametrize(("lengths", "sizes"), [([3, 1, 9, 2], [7, 0, 20]), ([2, 0, 3, 1], [7, 0, 20]), ([4, 2], [])])
def test_caps_and_sinks(lengths, sizes, window, softcap, sink):
    kept = [s if window is None else min(s, window - 1) for s in sizes]
    row = make_row(lengths, sizes, [1, 1, 2][: len(sizes)])
    q, k, v = make_qkv(sum(lengths), sum(kept))
    options = {"softcap": softcap, "sink": sink}
    expected = dense(q.double(), k.double(), v.double(), row, kept, 0.25, window, **options)
    got = row_attention(q, k, v, row, kept, 0.25, window, **options)
    torch.testing.assert_close(got, expected.float(), atol=3e-6, rtol=1e-5)
    without = row_attention(q, k, v, row, kept, 0.25, window)
    assert (without - got).abs().max() > 0.05


@pytest.mark.parametrize(("softcap", "sink"), PARTS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sizes", [[], [5, 0]])
def test_gradients_of_caps_and_sinks(sizes, window, softcap, sink):
    row = make_row([3, 1, 6], sizes, [1, 2][: len(sizes)])
    kept = [s if window is None else min(s, window - 1) for s in sizes]
    results = []
    # In fp32 too: there kernels would run whose backward forgets the logsumexp.
    for function, kind in ((dense, torch.float64), (row_attention, torch.float64), (row_attention, torch.float32)):
        inputs = [x.requires_grad_() for x in make_qkv(10, sum(kept), dtype=kind)]
        if sink is not None:
            inputs.append(sink.to(kind, copy=True).requires_grad_())
        options = {"softcap": softcap, "sink": inputs[3] if sink is not None else None}
        function(*inputs[:3], row, kept, 0.25, window, **options).square().sum().backward()
        results.append([x.grad for x in inputs])
    for expected, double, single in zip(*results, strict=True):
        torch.testing.assert_close(double, expected, atol=1e-10, rtol=1e-9)
        torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=1e-4)


def test_no_dropout_with_caps_or_sinks():
    row = make_row([3])
    for options in ({"softcap": 2.0}, {"sink": SINK}):
        q, k, v = (x.requires_grad_() for x in make_qkv(3))
        for window in (None, 2):
            with pytest.raises(NotImplementedError, match="no dropout together"):
                row_attention(q, k, v, row, [], 0.25, window, 0.1, **options)


def test_values_narrower_than_keys():
    row, module = make_row([3, 4], [6], [2]), torch.nn.Identity()
    module.layer_idx = 0
    q, k, v = make_qkv(7, 6)
    v = v[..., :10]
    with attention.running(attention.PackedCall(row, [[6]])):
        got, _ = attention.attention_on_row(module, q, k, v, None, scaling=0.25)
    expected = dense(q.double(), k.double(), v.double(), row, [6], 0.25)
    assert got.shape == (1, 7, 6, 10)
    torch.testing.assert_close(got[0], expected.float(), atol=3e-6, rtol=1e-5)


def single_pass(q, k, v, row, past, scale, softcap, sink):
    """One bf16 call over all keys of each sequence: torch's kernel; with a cap or a sink what tensor cores and eager
    attention do, which is scores and softmax in fp32, and the probabilities rounded to bf16 for the last product."""
    outs, token = [], 0
    for n in row.lengths:
        places = [*range(past), *range(past + token, past + token + n)]
        seen = torch.arange(past + n) <= torch.arange(past, past + n).unsqueeze(1)
        keys, values = (x[:, :, places].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        queries = q[:, :, token : token + n]
        if softcap is None and sink is None:
            out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scale)
        else:
            scores = queries.float() @ keys.float().transpose(2, 3) * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~seen, -torch.inf)
            if sink is not None:
                scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(1, -1, n, 1)], -1)
            p = scores.softmax(-1)[..., : past + n].bfloat16()
            out = (p.float() @ values.float()).bfloat16()
        outs.append(out[0].transpose(0, 1))
        token += n
    return torch.cat(outs)


@pytest.mark.parametrize(("softcap", "sink"), [(None, None), *PARTS])
@pytest.mark.parametrize("past", [33, 512, 2048])
def test_bf16_is_as_good_as_one_pass(past, softcap, sink):
    lengths = [40, 17, 33]
    row = make_row(lengths, [past], [3])
    q, k, v = make_qkv(sum(lengths), past, d=64, dtype=torch.bfloat16)
    q = q * 0.5  # of unit variance, as the bound was measured
    exact = dense(q.double(), k.double(), v.double(), row, [past], 0.125, None, softcap, sink)
    got = row_attention(q, k, v, row, [past], 0.125, softcap=softcap, sink=sink)
    assert got.dtype == torch.bfloat16

    def error(x):
        return ((x.double() - exact).norm() / exact.norm()).item()

    single = single_pass(q, k, v, row, past, 0.125, softcap, sink)
    assert error(got) <= 1.25 * error(single)


@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("lengths", [[3, 1, 9, 2], [2, 0, 3, 1]])
@pytest.mark.parametrize("switch", [True, False])
def test_what_the_varlen_kernel_is_given(lengths, window, switch, monkeypatch):
    """The CUDA branch, with a stand-in that follows varlen_attn's documentation (logsumexp as (H, N)). In torch 2.11 it
    has no switch for shared heads, and shares them."""

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux, window_size, scale=None, **more):
        assert set(more) <= ({"enable_gqa"} if switch else set()) and window_size[1] == 0
        assert not switch or more.get("enable_gqa", False) == (q.shape[1] != k.shape[1])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        outs, lses = [], []
        for (q0, q1), (k0, k1) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
            assert q1 - q0 <= max_q and k1 - k0 <= max_k
            scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * (scale or 1.0)
            at = torch.arange(q1 - q0).unsqueeze(1) + (k1 - k0) - (q1 - q0)
            place = torch.arange(k1 - k0)
            seen = place <= at
            if window_size[0] >= 0:
                seen &= place >= at - window_size[0]
            scores = scores.masked_fill(~seen, -torch.inf)
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[k0:k1]))
            lses.append(scores.logsumexp(-1))
        return (torch.cat(outs), torch.cat(lses, 1)) if return_aux is not None else torch.cat(outs)

    parameters = {"window_size", "scale", *(["enable_gqa"] if switch else [])}
    monkeypatch.setattr(attention_kernels, "_varlen_parameters", lambda: parameters)
    assert attention_kernels.varlen_ready()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(backends, "_varlen", lambda *_: backends.Kernel("varlen", attention_kernels.varlen_torch))
    attention_kernels._lse_has_heads_first.cache_clear()
    for sizes in ([7, 0, 20], [0, 0, 0]):
        kept = [s if window is None else min(s, window - 1) for s in sizes]
        row = make_row(lengths, sizes, [1, 1, 2])
        for heads in ((6, 2), (sum(lengths), sum(lengths))):  # N = H is where the layout is ambiguous
            q, k, v = make_qkv(sum(lengths), sum(kept), heads=heads)
            expected = dense(q.double(), k.double(), v.double(), row, kept, 0.25, window)
            got = row_attention(q, k, v, row, kept, 0.25, window)
            torch.testing.assert_close(got, expected.float(), atol=3e-6, rtol=1e-5)
    attention_kernels._lse_has_heads_first.cache_clear()

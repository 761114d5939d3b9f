"""Attention with shared prompts: float64 against explicit scores, finite differences, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from tree_oracle import HEADS, LENGTHS, PARENT, Layer, dense, in_given_order, make_qkv

from opcd_fast.attention import TreeCall, packed_row, tree_row
from opcd_fast.attention import kernels as attention_kernels
from opcd_fast.attention import pairs as attention_pairs
from opcd_fast.attention import tree as tree_attention
from opcd_fast.attention.pairs import Spans

CPU = torch.device("cpu")


def make_row(lengths=LENGTHS, parent=PARENT):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return tree_row(bounds, torch.tensor(parent), int(bounds[-1]), CPU)


def of_children(row):
    """The differentiable part alone, as a function of all queries, keys and values in the row's order."""
    roots, prompts = row.root_tokens, sum(row.prompt_lengths)

    def run(query, key, value):
        q, k, v = (x[:, :, roots:] for x in (query, key, value))
        return tree_attention._AttentionAfterPrompts.apply(
            q, k, v, key[:, :, :prompts], value[:, :, :prompts], row, 0.5
        )

    return run


@pytest.mark.parametrize("heads", HEADS)
def test_gradients_are_those_of_finite_differences(heads):
    row = make_row()
    assert gradcheck(of_children(row), make_qkv(sum(LENGTHS), heads, d=2))


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 100])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_explicit_scores(heads, window, dtype):
    row, given = make_row(), make_qkv(sum(LENGTHS), heads, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    got, expected = in_given_order(*given, row, 0.25, window), dense(*exact, 0.25, window)
    grad_out = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert got.dtype == dtype
    tolerance = 3e-6 if dtype == torch.float32 else 2e-2
    grads = torch.autograd.grad(got, given, grad_out.to(dtype))
    wanted = torch.autograd.grad(expected, exact, grad_out.to(dtype).double())
    for result, reference in zip((got, *grads), (expected, *wanted), strict=True):
        assert (result - reference).norm() <= tolerance * reference.norm().clamp_min(1.0)


@pytest.mark.parametrize(
    ("lengths", "parent"),
    [
        ([5], [-1]),
        ([3, 2], [-1, -1]),
        ([1, 1], [-1, 0]),
        ([1, 1, 1, 1], [-1, 0, -1, 2]),
        ([2, 0, 0], [-1, 0, 0]),
        ([0, 2], [-1, -1]),
        ([40, 70, 3], [-1, 0, 0]),
    ],
)
def test_shapes_of_rows(lengths, parent):
    row, given = make_row(lengths, parent), make_qkv(sum(lengths))
    given = [x.detach().float() for x in given]
    expected = dense(*(x.double() for x in given), 0.25, lengths=lengths, parent=parent)
    torch.testing.assert_close(in_given_order(*given, row, 0.25), expected.float(), atol=3e-6, rtol=1e-5)


def on_the_cpu(tensors, cu_q, cu_k, max_q, max_k, dropout, causal):
    """What a kernel for stretches is given, (n, H, d) and bounds, as the CPU's pair takes it."""
    rows = [packed_row(bounds, int(bounds[-1]), CPU) for bounds in (cu_q, cu_k)]
    assert dropout == 0.0 and (max_q, max_k) == tuple(row.longest for row in rows)
    return [x.transpose(0, 1).unsqueeze(0) for x in tensors], Spans(rows[0], rows[0] if causal else rows[1], causal)


def stand_in_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
    """What `aten._flash_attention_forward` is for stretches: logsumexp (H_q, n) out."""
    assert not debug
    inputs, spans = on_the_cpu((q, k, v), cu_q, cu_k, max_q, max_k, dropout, causal)
    out, lse = attention_pairs._CPU.forward(*inputs, spans, scale)
    return out, lse.t(), None, None, None


def stand_in_backward(
    grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused, *, scale
):
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous() and grad_out.is_contiguous()
    inputs, spans = on_the_cpu((q, k, v), cu_q, cu_k, max_q, max_k, dropout, causal)
    grads = attention_pairs._CPU.backward(grad_out, *inputs, out, lse.t(), spans, scale)
    return [x[0].transpose(0, 1) for x in grads]


@pytest.mark.parametrize("heads", HEADS)
def test_what_the_flash_kernels_are_given(heads, monkeypatch):
    """The CUDA branch, with stand-ins that follow the contract by which torch's own varlen attention calls them."""

    class Aten:
        _flash_attention_forward = staticmethod(stand_in_forward)
        _flash_attention_backward = staticmethod(stand_in_backward)
        _scaled_dot_product_flash_attention_for_cpu_backward = staticmethod(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        )

    monkeypatch.setattr(attention_pairs, "aten", Aten)
    monkeypatch.setattr(tree_attention, "pair_for", lambda query: attention_pairs.VarlenPair())
    assert gradcheck(of_children(make_row()), make_qkv(sum(LENGTHS), heads, d=4), fast_mode=True)


def test_what_the_memory_efficient_kernels_are_given(monkeypatch):
    """The other CUDA branch: logsumexps padded to 32 queries, as those kernels have them."""
    cpu = torch.ops.aten

    class Aten:
        @staticmethod
        def _scaled_dot_product_efficient_attention(q, k, v, bias, with_lse, dropout, causal, *, scale):
            assert bias is None and with_lse and dropout == 0.0 and q.shape[1] == k.shape[1] == v.shape[1]
            out, lse = cpu._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
            return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf), None, None

        @staticmethod
        def _scaled_dot_product_efficient_attention_backward(
            grad_out, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale
        ):
            assert lse.shape[2] % 32 == 0 and dropout == 0.0 and wanted == [True, True, True, False]
            lse = lse[:, :, : q.shape[2]].contiguous()
            return *cpu._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
            ), None

    for module in (attention_pairs, attention_kernels):
        monkeypatch.setattr(module, "aten", Aten)
    monkeypatch.setattr(tree_attention, "pair_for", lambda query: attention_pairs._EFFICIENT)
    assert gradcheck(of_children(make_row()), make_qkv(sum(LENGTHS), d=4), fast_mode=True)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"softcap": 30.0}, "softcap"), ({"s_aux": torch.zeros(4)}, "s_aux"), ({"dropout": 0.1}, "dropout")],
)
def test_scores_it_does_not_compute_are_refused(changes, name):
    with pytest.raises(NotImplementedError, match=name):
        TreeCall(make_row([3, 2, 2], [-1, 0, 0])).attend(Layer(), *make_qkv(7), None, **changes)


def test_the_layer_is_counted_and_keys_must_be_the_rows_own():
    call = TreeCall(make_row([3, 2, 2], [-1, 0, 0]))
    call.attend(Layer(), *make_qkv(7, dtype=torch.float32), None)
    assert call.layers_done == {2}
    with pytest.raises(RuntimeError, match="8 queries and 8 keys for a row of 7"):
        call.attend(Layer(), *make_qkv(8), None)


def test_values_narrower_than_keys():
    row = make_row([3, 2, 2], [-1, 0, 0])
    query, key, value = (x.detach().float() for x in make_qkv(7))
    wide, _ = TreeCall(row).attend(Layer(), query, key, value, None)
    narrow, _ = TreeCall(row).attend(Layer(), query, key, value[..., :5], None)
    torch.testing.assert_close(narrow, wide[..., :5])


@pytest.mark.parametrize(
    ("lengths", "parent", "message"),
    [
        ([2, 2], [-1], "expected 2 integers"),
        ([2, 2], [-1.0, 0.0], "expected 2 integers"),
        ([2, 2], [0, -1], r"parent\[0\] is 0: expected -1"),
        ([2, 2], [1, -1], "must come before it"),
        ([2, 2], [-1, -2], r"parent\[1\] is -2"),
        ([2, 2, 2], [-1, 0, 1], "one level deep"),
        ([0, 2], [-1, 0], "a prompt without tokens"),
    ],
)
def test_malformed_parents(lengths, parent, message):
    with pytest.raises(ValueError, match=message):
        make_row(lengths, parent)

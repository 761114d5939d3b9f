"""Attention in blocks against explicit scores in float64, with small blocks so that there are many."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import double, explicit

from opcd_fast.attention import blocked as module
from opcd_fast.attention.blocked import blocked_attention

CASES = [  # queries, keys, causal, window
    (7, 19, False, None),
    (1, 1, False, None),
    (13, 13, True, None),
    (9, 30, True, None),
    (11, 29, True, 6),
    (8, 8, True, 1),
    (5, 40, True, 100),
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 6 * 5 * 3)
    monkeypatch.setattr(module, "_BLOCK_KEYS", 5)


def tensors(n, m, dtype=torch.float64, heads=(6, 2), d=8, e=5):
    g = torch.Generator().manual_seed(n + m)
    shapes = ((1, heads[0], n, d), (1, heads[1], m, d), (1, heads[1], m, e))
    return [(2 * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype) for s in shapes]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("n", "m", "causal", "window"), CASES)
def test_numbers(n, m, causal, window, softcap):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        inputs = tensors(n, m, dtype)
        out, lse = blocked_attention(*inputs, 0.3, softcap=softcap, causal=causal, window=window)
        expected, expected_lse = explicit(*double(*inputs), 0.3, softcap, causal=causal, window=window)
        assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, atol=min(tolerance, 1e-5), rtol=1e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("n", "m", "causal", "window"), CASES)
def test_gradients_through_both_results(n, m, causal, window, softcap):
    inputs = [x.requires_grad_() for x in tensors(n, m, heads=(2, 1), d=3, e=2)]

    def function(*qkv):
        return blocked_attention(*qkv, 0.3, softcap=softcap, causal=causal, window=window)

    assert torch.autograd.gradcheck(function, inputs)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**16)
    largest, honest = [0], module._Shape.scores

    def scores(self, *args):
        result = honest(self, *args)
        largest[0] = max(largest[0], result.numel() * result.element_size())
        return result

    monkeypatch.setattr(module._Shape, "scores", scores)
    blocked_attention(*tensors(900, 1000, torch.float32), 0.3, causal=True)
    assert 2**12 < largest[0] <= 2**16


@pytest.mark.parametrize(("n", "m", "options"), [(2, 0, {}), (3, 2, {"causal": True}), (2, 2, {"window": 1})])
def test_undefined(n, m, options):
    with pytest.raises(ValueError, match="not defined"):
        blocked_attention(*tensors(n, m), 0.3, **options)

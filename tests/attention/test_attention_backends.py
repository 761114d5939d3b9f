"""Which kernel is chosen for which call, on devices that are not here too; and what each kernel is given.

The wrappers around CUDA kernels run against stand-ins that follow the kernels' documented arguments and results.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from attention_oracle import by_stretch, dense, explicit, make_qkv, make_row

from opcd_fast.attention import backends, kernels
from opcd_fast.attention.backends import FA2, FA4, Need
from opcd_fast.attention.kernels import Bounds

NONE, BOTH = frozenset(), frozenset({FA2, FA4})
BF16, FP32 = torch.bfloat16, torch.float32


def need(capability=(9, 0), dtype=BF16, d=128, **options):
    return Need("cuda" if capability else "cpu", capability or (0, 0), dtype, d, **options)


@pytest.fixture(autouse=True)
def _a_full_torch(monkeypatch):
    monkeypatch.setattr(backends, "_triton_ready", lambda: True)
    monkeypatch.setattr(kernels, "varlen_ready", lambda: True)


TABLE = [  # need, packages, phase 1, phase 2, windowed, merge
    (need(None, FP32), NONE, "CPU flash", "CPU flash", "dense", "torch"),
    (need(None, BF16), BOTH, "CPU flash", "CPU flash", "dense", "torch"),
    (need(None, FP32, softcap=True), BOTH, "blocked", "blocked", "blocked", "torch"),
    (need(), NONE, "flash", "varlen", "varlen", "Triton"),
    (need(), BOTH, "flash", "varlen", "varlen", "Triton"),
    (need(d=256), BOTH, "flash", "varlen", "varlen", "Triton"),
    (need(d=192), NONE, "flash", "varlen", "varlen", "Triton"),
    (need(d=76), BOTH, "memory-efficient", "memory-efficient", "dense", "Triton"),
    (need(d=512), BOTH, "memory-efficient", "memory-efficient", "dense", "Triton"),
    (need(dtype=FP32), BOTH, "memory-efficient", "memory-efficient", "dense", "Triton"),
    (need((7, 5)), BOTH, "memory-efficient", "memory-efficient", "dense", "Triton"),
    (need(dtype=torch.float64), BOTH, "blocked", "blocked", "dense", "torch"),
    (need(softcap=True), BOTH, FA4, FA4, FA4, "Triton"),
    (need(softcap=True), frozenset({FA2}), FA2, FA2, FA2, "Triton"),
    (need(softcap=True), NONE, "flex", "flex", "blocked", "Triton"),
    (need(softcap=True, d=256), BOTH, FA4, FA4, FA4, "Triton"),
    (need((8, 0), softcap=True, d=256), BOTH, FA2, FA2, FA2, "Triton"),
    (need((10, 0), softcap=True, d=256), frozenset({FA4}), "flex", "flex", "blocked", "Triton"),
    (need((12, 0), softcap=True, d=128), BOTH, FA4, FA4, FA4, "Triton"),
    (need(softcap=True, dtype=FP32), BOTH, "flex", "flex", "blocked", "Triton"),
    (need(softcap=True, d=8, dtype=FP32), BOTH, "blocked", "blocked", "blocked", "Triton"),
    (need((7, 5), softcap=True), BOTH, "blocked", "blocked", "blocked", "Triton"),
    (need(gradient=True), BOTH, "blocked", "varlen", "varlen", "torch"),
    (need(gradient=True, softcap=True), BOTH, "blocked", FA2, FA2, "torch"),
    (need(gradient=True, softcap=True), NONE, "blocked", "blocked", "blocked", "torch"),
    (need(gradient=True, lse_gradient=True), BOTH, "blocked", "blocked", "blocked", "torch"),
    (need(gradient=True, dropout=True), BOTH, "blocked", "memory-efficient", "dense", "torch"),
    (Need("mps", (0, 0), FP32, 64), NONE, "blocked", "blocked", "dense", "torch"),
]


@pytest.mark.parametrize(("call", "packages", "first", "second", "windowed", "merge"), TABLE)
def test_table(call, packages, first, second, windowed, merge):
    assert backends.phase_1(call, packages).name == first
    assert backends.phase_2(call, packages).name == second
    assert backends.windowed(call, packages).name == windowed
    assert backends.merge(call) == merge


def test_what_torch_lacks(monkeypatch):
    monkeypatch.setattr(backends, "_triton_ready", lambda: False)
    monkeypatch.setattr(kernels, "varlen_ready", lambda: False)
    assert backends.phase_1(need(), BOTH).name == "flash" and backends.merge(need()) == "torch"
    assert backends.phase_2(need(), BOTH).name == FA4 and backends.phase_2(need(), frozenset({FA2})).name == FA2
    assert backends.phase_2(need(), NONE).name == "memory-efficient"
    assert backends.windowed(need(), NONE).name == "dense"
    assert backends.windowed(need(), NONE, with_lse=True).name == "blocked"


def test_description():
    text = backends.describe(need(softcap=True), windows=True, sinks=True, packages=BOTH)
    assert text == (
        "phase 1 FlashAttention-4, phase 2 FlashAttention-4, with softcap, merge Triton with sinks; "
        "windowed layers: FlashAttention-4"
    )


def test_dropout_is_not_dropped():
    for call in (need(dropout=True, softcap=True), need(dropout=True, lse_gradient=True)):
        with pytest.raises(NotImplementedError, match="no dropout together"):
            backends.phase_2(call, BOTH)
    with pytest.raises(NotImplementedError, match="no dropout together"):
        backends.windowed(need(dropout=True), BOTH, with_lse=True)


# --- what the kernels are given -----------------------------------------------------------------------------


def package(no_window, flag, tail):
    """A FlashAttention package: logsumexps are (B, H, N) and, of sequences of any lengths, (H, N)."""
    module = types.ModuleType("flash_attn")

    def flash_attn_func(*, q, k, v, softmax_scale, causal, softcap, **options):
        assert options == {flag: True} and not causal and q.shape[0] == 1
        out, lse = explicit(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale, softcap or None, causal=False)
        return (out[None], lse.t()[None], *tail)

    def flash_attn_varlen_func(
        *, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap,
        **options,
    ):  # fmt: skip
        assert options == {flag: True} and causal
        assert window_size == no_window or (window_size[0] >= 0 and window_size[1] == 0)
        window = None if window_size == no_window else window_size[0] + 1
        bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = by_stretch(q, k, v, *bounds, softmax_scale, softcap or None, window=window)
        return (out, lse.t(), *tail)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


@pytest.fixture
def packages(monkeypatch):
    module = package((-1, -1), "return_attn_probs", (None,))
    module.cute = package((None, None), "return_lse", ())
    module.__path__ = []
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module.cute)
    backends.installed.cache_clear()
    assert backends.installed() == BOTH
    yield
    backends.installed.cache_clear()


def test_a_package_that_does_not_import(monkeypatch):
    backends.installed.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert backends.installed() == NONE
    backends.installed.cache_clear()


def check_prefix(kernel, softcap):
    q, k, v = make_qkv(7, 27, dtype=torch.float64)
    out, lse = kernel(q, k, v, 0.25, softcap)
    expected, expected_lse = explicit(q, k, v, 0.25, softcap, causal=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", ["prefix_fa4", "prefix_fa2", "prefix_flex", "prefix_blocked"])
def test_phase_1(name, softcap, packages):
    check_prefix(getattr(kernels, name), softcap)


@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_phase_1_of_torch(name, monkeypatch):
    def attention(query, key, value, scale):
        out, lse = explicit(query, key, value, scale, causal=False)
        return out.transpose(0, 1)[None], lse.t()[None]

    def flash(query, key, value, dropout_p, is_causal, return_debug_mask, *, scale):
        assert dropout_p == 0.0 and not is_causal and not return_debug_mask
        out, lse = attention(query, key, value, scale)
        return out, torch.nn.functional.pad(lse, (0, 5), value=torch.nan), *[None] * 7

    def efficient(query, key, value, bias, compute_log_sumexp, dropout, causal, *, scale):
        assert bias is None and compute_log_sumexp and query.shape[1] == key.shape[1] and not dropout and not causal
        out, lse = attention(query, key, value, scale)
        return out, torch.nn.functional.pad(lse, (0, 5), value=torch.nan), None, None

    stand_in = types.SimpleNamespace(
        _scaled_dot_product_flash_attention=flash,
        _scaled_dot_product_efficient_attention=efficient,
    )
    monkeypatch.setattr(kernels, "aten", stand_in)
    check_prefix(getattr(kernels, f"prefix_{name}"), None)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lengths", [[3, 1, 9, 2], [2, 0, 3], [4, 4]])
@pytest.mark.parametrize("name", ["fa4", "fa2", "row_flex", "row_blocked"])
def test_phase_2(name, lengths, softcap, packages):
    row = make_row(lengths)
    q, k, v = make_qkv(sum(lengths), dtype=torch.float64)
    run = kernels.row_varlen(getattr(kernels, f"varlen_{name}")) if name.startswith("fa") else getattr(kernels, name)
    out, lse = run(q, k, v, row, 0.25, softcap, 0.0, True)
    torch.testing.assert_close(out, dense(q, k, v, row, [], 0.25, softcap=softcap))
    # The logsumexp by what it means: a sink of that height halves everything.
    halved = dense(q[:, :1], k[:, :1], v[:, :1], row, [], 0.25, softcap=softcap, sink=lse[:1, 0])
    torch.testing.assert_close(halved[0], out[0, :1] / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", ["fa4", "fa2"])
def test_windows(name, softcap, packages):
    q, k, v = make_qkv(7, 27, dtype=torch.float64)
    bounds = Bounds(torch.tensor([0, 3, 7]), torch.tensor([0, 12, 27]), 4, 15)
    out, lse = getattr(kernels, f"varlen_{name}")(q, k, v, bounds, 0.25, softcap, 5, True)
    for tokens, keys in ((slice(0, 3), slice(0, 12)), (slice(3, 7), slice(12, 27))):
        expected, expected_lse = explicit(q[:, :, tokens], k[:, :, keys], v[:, :, keys], 0.25, softcap, window=5)
        torch.testing.assert_close(out[tokens], expected)
        torch.testing.assert_close(lse[tokens], expected_lse)

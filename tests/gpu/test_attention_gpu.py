"""Every attention kernel that this device takes against blocks of scores in fp64, and the merge against its twin."""

from __future__ import annotations

import itertools

import pytest
import torch

from opcd_fast.attention import backends, kernels, packed_row
from opcd_fast.attention.blocked import blocked_attention
from opcd_fast.attention.kernels import Bounds
from opcd_fast.kernels.reference import attention as specification

pytestmark = pytest.mark.gpu

PHASE_1 = {
    "flash": kernels.prefix_flash,
    "memory-efficient": kernels.prefix_efficient,
    "flex": kernels.prefix_flex,
    backends.FA4: kernels.prefix_fa4,
    backends.FA2: kernels.prefix_fa2,
}
CAPPED = ("flex", backends.FA4, backends.FA2)
VARLEN = {"varlen": kernels.varlen_torch, backends.FA4: kernels.varlen_fa4, backends.FA2: kernels.varlen_fa2}


def skip_where_missing(name):
    if name in (backends.FA4, backends.FA2) and name not in backends.installed():
        pytest.skip(f"{name} is not installed")
    if name == "varlen" and not kernels.varlen_ready():
        pytest.skip("no varlen kernel with windows")


def tensors(n, m, d, heads=(8, 2)):
    g = torch.Generator().manual_seed(n + m)
    shapes = ((1, heads[0], n, d), (1, heads[1], m, d), (1, heads[1], m, d))
    return [torch.randn(s, generator=g).to("cuda", torch.bfloat16) for s in shapes]


def close(out, lse, expected, expected_lse):
    assert out.dtype == torch.bfloat16 and out.shape == expected.shape
    assert float((out.double() - expected).norm() / expected.norm()) < 6e-3  # bf16 rounds twice: about 2.5e-3
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("name", "softcap"), [*((n, None) for n in PHASE_1), *((n, 3.0) for n in CAPPED)])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1000, 128), (37, 3, 64), (200, 513, 128), (65, 1, 64)])
def test_phase_1(name, softcap, n, m, d):
    skip_where_missing(name)
    q, k, v = tensors(n, m, d)
    out, lse = PHASE_1[name](q, k, v, d**-0.5, softcap)
    close(out, lse, *blocked_attention(q.double(), k.double(), v.double(), d**-0.5, softcap=softcap))


@pytest.mark.parametrize(("name", "softcap"), [("varlen", None), *itertools.product(CAPPED[1:], (None, 3.0))])
@pytest.mark.parametrize("window", [None, 40])
def test_varlen(name, softcap, window):
    skip_where_missing(name)
    sizes = [(5, 120), (1, 1), (64, 64), (33, 700)]
    q, k, v = tensors(sum(n for n, _ in sizes), sum(m for _, m in sizes), 128)
    cu_q, cu_k = (torch.tensor([0, *x], device="cuda").cumsum(0, dtype=torch.int32) for x in zip(*sizes, strict=True))
    out, lse = VARLEN[name](q, k, v, Bounds(cu_q, cu_k, 64, 700), 0.1, softcap, window, True)
    expected = [
        blocked_attention(a.double(), b.double(), c.double(), 0.1, softcap=softcap, causal=True, window=window)
        for a, b, c in zip(
            q.split([n for n, _ in sizes], 2), *(x.split([m for _, m in sizes], 2) for x in (k, v)), strict=True
        )
    ]
    close(out, lse, torch.cat([x for x, _ in expected]), torch.cat([x for _, x in expected]))


@pytest.mark.parametrize(("run", "softcap"), [(kernels.row_on_grid, None), (kernels.row_flex, 3.0)])
def test_rows_on_a_grid(run, softcap):
    row = packed_row(torch.tensor([0, 5, 5, 69, 102]), 102, torch.device("cuda"))
    q, k, v = tensors(102, 102, 64)
    out, lse = run(q, k, v, row, 0.125, softcap, 0.0, True)
    close(out, lse, *kernels.row_blocked(q.double(), k.double(), v.double(), row, 0.125, softcap, 0.0, True))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_merge(width, sinks):
    from opcd_fast.kernels.triton import merge_attention

    g = torch.Generator(device="cuda").manual_seed(0)
    outs = [torch.randn(1000, 12, width, generator=g, device="cuda").bfloat16() for _ in range(2)]
    lses = [torch.randn(1000, 12, generator=g, device="cuda") for _ in range(2)]
    sink = torch.randn(12, generator=g, device="cuda") if sinks else None
    expected = specification.merge_attention(outs[0], lses[0], outs[1], lses[1], sink=sink)
    got = merge_attention(outs[0], lses[0], outs[1], lses[1], sink=sink, out=outs[0])
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)  # one unit in the last place

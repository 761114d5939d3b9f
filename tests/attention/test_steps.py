"""One new token in each row, over its own keys and what all rows share: against explicit scores in float64."""

import pytest
import torch
from attention_oracle import explicit

from opcd_fast.attention import Visible, kernels, step_attention

D = 16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def made(rows, own, prefix, heads, dtype, value_size=D):
    generator = torch.Generator().manual_seed(rows + own + prefix)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    query = normal(rows, heads[0], 1, D) * 2
    shared = (normal(1, heads[1], prefix, D), normal(1, heads[1], prefix, value_size)) if prefix else None
    return query, normal(rows, heads[1], own, D), normal(rows, heads[1], own, value_size), shared


def wanted(query, key, value, scale, shared, own_from, prefix_from, softcap, sink):
    """Row by row, over the keys that it sees put one behind the other."""
    outs = []
    for row in range(len(query)):
        k, v = key[row : row + 1, :, own_from[row] :], value[row : row + 1, :, own_from[row] :]
        if shared is not None:
            k, v = (torch.cat([x[:, :, prefix_from[row] :], y], 2) for x, y in zip(shared, (k, v), strict=True))
        one = (x.double() for x in (query[row : row + 1], k, v))
        outs.append(explicit(*one, scale, softcap, causal=False, sink=sink)[0])
    return torch.stack(outs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("prefix", [0, 1, 37])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (3.0, False), (None, True), (3.0, True)])
@pytest.mark.parametrize("ragged", [False, True])
def test_it_is_attention_over_both(dtype, heads, prefix, softcap, sinks, ragged):
    rows, own, scale = 5, 11, 0.3
    query, key, value, shared = made(rows, own, prefix, heads, dtype)
    sink = torch.linspace(-1, 3, heads[0], dtype=torch.float64) if sinks else None
    own_from, prefix_from, visible = [0] * rows, [0] * rows, Visible()
    if ragged:  # the third row sees nothing of the prefix, the last one a single own key
        own_from, prefix_from = [0, 3, 1, 0, own - 1], [0, 5, prefix, prefix - 1, 2]
        prefix_from = [min(max(first, 0), prefix) for first in prefix_from]
        bias = torch.zeros(rows, own).masked_fill(torch.arange(own) < torch.tensor(own_from)[:, None], -torch.inf)
        visible = Visible(bias)
        if prefix:
            first = torch.tensor(prefix_from)[:, None]
            hidden = (torch.arange(prefix) < first) & (first < prefix)
            hidden = hidden.repeat_interleave(heads[0] // heads[1], 0)
            visible = Visible(bias, torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf), first[:, 0] < prefix)
    found = step_attention(
        query, key, value, scale, shared, visible, softcap=softcap, sink=None if sink is None else sink.to(dtype)
    )
    assert found.shape == (rows, 1, heads[0], D) and found.dtype == dtype
    exact = wanted(query, key, value, scale, shared, own_from, prefix_from, softcap, sink)
    torch.testing.assert_close(found.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_to_scores_lies_as_a_devices_kernels_want_it(dtype, monkeypatch):
    """Rows begin at multiples of 8 elements, also when the scores are of another type than the bias."""
    strides, inner = [], kernels.cpu_flash
    of = lambda x: [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]  # noqa: E731
    note = lambda *a: strides.append(of(a[5])) or inner(*a)  # noqa: E731
    monkeypatch.setattr(kernels, "cpu_flash", note)
    query, key, value, shared = made(5, 11, 13, (4, 2), dtype)
    bias = torch.zeros(5, 16, dtype=torch.bfloat16)[:, :11], torch.zeros(10, 16, dtype=torch.bfloat16)[:, :13]
    step_attention(query, key, value, 0.3, shared, Visible(*bias, torch.ones(5, dtype=torch.bool)))
    assert strides == [[16], [16]]


@pytest.mark.parametrize("prefix", [0, 9])
def test_values_may_be_narrower_than_keys(prefix):
    query, key, value, shared = made(3, 7, prefix, (4, 4), torch.float32, value_size=10)
    found = step_attention(query, key, value, 0.3, shared)
    exact = wanted(query, key, value, 0.3, shared, [0] * 3, [0] * 3, None, None)
    torch.testing.assert_close(found.double(), exact, atol=3e-6, rtol=3e-6)

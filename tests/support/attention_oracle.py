"""Attention by explicit scores, and rows to compute it on."""

from __future__ import annotations

from itertools import pairwise

import torch

from opcd_fast.attention import PackedRow, PrefixGroup


def explicit(query, key, value, scale, softcap=None, *, causal=True, window=None, sink=None):
    """(1, H_q, n, d), (1, H_kv, m, d), (1, H_kv, m, e) -> (n, H_q, e), and the logsumexp (n, H_q) without the sink.

    The queries stand at the last n places. window: keys a query sees, itself included.
    """
    key, value = (x[0].repeat_interleave(query.shape[1] // x.shape[1], 0) for x in (key, value))
    scores = query[0] @ key.transpose(1, 2) * scale  # (H_q, n, m)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    n, m = scores.shape[1:]
    if causal:
        distance = torch.arange(n).unsqueeze(1) + m - n - torch.arange(m)
        scores = scores.masked_fill((distance < 0) | (distance >= (window or m + 1)), -torch.inf)
    lse = scores.logsumexp(-1)
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores).view(-1, 1, 1).expand(-1, n, 1)], -1)
    return (scores.softmax(-1)[..., :m] @ value).transpose(0, 1), lse.transpose(0, 1)


def by_stretch(q, k, v, cu_q, cu_k, longest_q, longest_k, *scale, **options):
    """What a varlen kernel computes: (n, H_q, d), (m, H_kv, d) -> (n, H_q, d), (n, H_q), each stretch by itself."""
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert q1 - q0 <= longest_q and k1 - k0 <= longest_k
        parts = (x.transpose(0, 1).unsqueeze(0) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out, lse = explicit(*parts, *scale, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def make_row(lengths, sizes=(), per_group=()):
    """Sequences of `lengths`, the first per_group[0] of which continue a prefix of sizes[0] tokens, and so on."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    groups, sequence = [], 0
    for size, number in zip(sizes, per_group, strict=True):
        end = sequence + number
        if size:
            groups.append(PrefixGroup(sequence, end, int(bounds[sequence]), int(bounds[end]), size))
        sequence = end
    return PackedRow(tuple(lengths), bounds.int(), tuple(groups))


def make_qkv(tokens, keys=None, heads=(6, 2), d=16, dtype=torch.float32):
    torch.manual_seed(3)
    keys = tokens if keys is None else keys
    query = torch.randn(1, heads[0], tokens, d, dtype=torch.float64) * 2
    key, value = (torch.randn(1, heads[1], keys, d, dtype=torch.float64) for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def make_prefixes(row, window=None, heads=2, d=16, dtype=torch.float32):
    """What a cache keeps for each group: all of it, or what a window sees."""
    kept = [g.length if window is None else min(g.length, window - 1) for g in row.groups]
    g = torch.Generator().manual_seed(4)
    return [
        tuple(torch.randn(1, heads, n, d, dtype=torch.float64, generator=g).to(dtype) for _ in range(2)) for n in kept
    ]


def dense(query, key, value, row, prefixes, scale, window=None, **options):
    """What `row_attention` computes, a sequence at a time."""
    out = []
    for group, (first, end) in zip(row.group_of_sequence, pairwise(row.bounds), strict=True):
        q, k, v = (x[:, :, first:end] for x in (query, key, value))
        if group is not None:
            k, v = (torch.cat(parts, 2) for parts in zip(prefixes[group], (k, v), strict=True))
        out.append(explicit(q, k, v, scale, window=window, **options)[0])
    return torch.cat(out)


def double(*tensors):
    """The same in float64, pairs included."""
    return [double(*x) if isinstance(x, tuple | list) else x.double() for x in tensors]

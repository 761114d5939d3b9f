"""Layers whose sliding window cuts keys off: one call over [end of the prefix, sequence] for each sequence.

They do not merge: what a token sees of its prefix depends on the token. So the end of the prefix is copied, at most
window - 1 keys for each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from opcd_fast.attention import backends
from opcd_fast.attention.blocked import blocked_attention
from opcd_fast.attention.kernels import Bounds, repeat_heads
from opcd_fast.attention.rows import KeysAndValues, PackedRow, PrefixGroup, on_device


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, prefixes: Sequence[KeysAndValues], scale: float,
    window: int, dropout: float = 0.0, *, softcap: float | None = None, with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `attention.row_attention`, where the window cuts keys off: (N, H_q, d), and (N, H_q) fp32 logsumexp or None.

    Differentiable, the logsumexp too.
    """
    tails = [_tail(group, prefix, window) for group, prefix in zip(row.groups, prefixes, strict=True)]
    inputs = (query, key, value, *(x for tail in tails for x in tail))
    need = backends.need_of(*inputs, softcap=softcap, dropout=dropout, with_lse=with_lse)
    kernel = backends.windowed(need, with_lse=with_lse)
    if kernel.name not in ("dense", "blocked"):
        plan = window, query.device  # all that it depends on besides the row
        if plan not in row.kept:
            row.kept[plan] = _gathered(row, [keys.shape[2] for keys, _ in tails], query.device)
        index, bounds = row.kept[plan]
        if tails:
            both = zip(*tails, (key, value), strict=True)
            key, value = (torch.cat(parts, 2).index_select(2, index) for parts in both)
        return kernel.run(query, key, value, bounds, scale, softcap, window, with_lse)

    pieces, levels = [], []
    for group, (first, end) in zip(row.group_of_sequence, pairwise(row.bounds), strict=True):
        if first == end:
            continue
        # One sequence at a time: a batch of them would copy the window's keys for each.
        q, k, v = (x[:, :, first:end] for x in (query, key, value))
        if group is not None:
            k, v = (torch.cat(parts, 2) for parts in zip(tails[group], (k, v), strict=True))
        if kernel.name == "blocked":
            out, lse = blocked_attention(q, k, v, scale, softcap=softcap, causal=True, window=window)
            levels.append(lse)
        else:
            out = _dense(q, k, v, scale, window, dropout)
        pieces.append(out)
    return torch.cat(pieces), torch.cat(levels) if with_lse else None


def _tail(group: PrefixGroup, prefix: KeysAndValues, window: int) -> KeysAndValues:
    """What the first token after the prefix sees of it."""
    first = prefix[0].shape[2] - min(group.length, window - 1)
    return prefix[0][:, :, first:], prefix[1][:, :, first:]


def _gathered(row: PackedRow, tails: Sequence[int], device: torch.device) -> tuple[Tensor, Bounds]:
    """Which keys the row's varlen call reads out of all tails and the row, and where each sequence's begin."""
    starts = [0, *accumulate(tails)]
    index, ends, sizes = [], [0], [0]
    for group, (first, end) in zip(row.group_of_sequence, pairwise(row.bounds), strict=True):
        if first < end:
            before = torch.arange(0) if group is None else torch.arange(starts[group], starts[group + 1])
            index += [before, torch.arange(first, end) + starts[-1]]
            ends.append(end)
            sizes.append(len(before) + end - first)
    cu_q, cu_k = torch.tensor(ends, dtype=torch.int32), torch.tensor(sizes).cumsum(0, dtype=torch.int32)
    bounds = Bounds(on_device(cu_q, device), on_device(cu_k, device), row.longest, max(sizes))
    return on_device(torch.cat(index), device), bounds


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, dropout: float) -> Tensor:
    first = key.shape[2] - query.shape[2]
    at = torch.arange(first, key.shape[2], device=key.device).unsqueeze(1)  # place of each query among the keys
    place = torch.arange(key.shape[2], device=key.device)
    out = F.scaled_dot_product_attention(
        query,
        repeat_heads(key, query),
        repeat_heads(value, query),
        attn_mask=(place <= at) & (place > at - window),  # (n, keys)
        dropout_p=dropout,
        scale=scale,
    )
    return out[0].transpose(0, 1)

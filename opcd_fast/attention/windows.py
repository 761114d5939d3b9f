"""Layers whose sliding window cuts keys off: one call over [end of the prefix, sequence] for each sequence.

They do not merge: what a token sees of its prefix depends on the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opcd_fast.attention import backends
from opcd_fast.attention.blocked import blocked_attention
from opcd_fast.attention.kernels import Bounds, repeat_heads
from opcd_fast.attention.rows import PackedRow, on_device


class _Stretch(NamedTuple):
    """A sequence's queries, and its keys: the end of its prefix, and those of its own tokens."""

    queries: tuple[int, int]
    prefix: tuple[int, int]
    own: tuple[int, int]


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    prefix_counts: Sequence[int],
    scale: float,
    window: int,
    dropout: float = 0.0,
    *,
    softcap: float | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `attention.row_attention`, where the window cuts keys off: (N, H_q, d), and (N, H_q) fp32 logsumexp or None.

    Differentiable, the logsumexp too. Raises RuntimeError when the cache kept fewer prefix keys than the window
    reaches back to.
    """
    key_of_layer = (tuple(prefix_counts), window)
    if key_of_layer not in row.kept:
        row.kept[key_of_layer] = _stretches(row, prefix_counts, window)
    stretches = row.kept[key_of_layer]
    need = backends.need_of(query, key, value, softcap=softcap, dropout=dropout)
    need = backends.for_gradients(need, through_lse=with_lse)
    kernel = backends.windowed(need, with_lse=with_lse)
    if kernel.name not in ("dense", "blocked"):
        device = query.device
        if (key_of_layer, device) not in row.kept:
            row.kept[key_of_layer, device] = _gathered(stretches, row.longest, device)
        index, bounds = row.kept[key_of_layer, device]
        key, value = key.index_select(2, index), value.index_select(2, index)
        return kernel.run(query, key, value, bounds, scale, softcap, window, with_lse)

    pieces, levels = [], []
    for stretch in stretches:
        # One sequence at a time: a batch of them would copy the window's keys for each.
        q = query[:, :, slice(*stretch.queries)]
        k, v = (torch.cat([x[:, :, slice(*stretch.prefix)], x[:, :, slice(*stretch.own)]], 2) for x in (key, value))
        if kernel.name == "blocked":
            out, lse = blocked_attention(q, k, v, scale, softcap=softcap, causal=True, window=window)
            levels.append(lse)
        else:
            out = _dense(q, k, v, scale, window, dropout)
        pieces.append(out)
    return torch.cat(pieces), torch.cat(levels) if with_lse else None


def _gathered(stretches: Sequence[_Stretch], longest: int, device: torch.device) -> tuple[Tensor, Bounds]:
    """Which keys the row's varlen call reads, in its order, and where each sequence's begin."""
    index = torch.cat([torch.arange(*span) for s in stretches for span in (s.prefix, s.own)])
    sizes = [s.own[1] - s.own[0] + s.prefix[1] - s.prefix[0] for s in stretches]
    cu_q = torch.tensor([0, *(s.queries[1] for s in stretches)], dtype=torch.int32)
    cu_k = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
    bounds = Bounds(on_device(cu_q, device), on_device(cu_k, device), longest, max(sizes))
    return on_device(index, device), bounds


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


def _stretches(row: PackedRow, prefix_counts: Sequence[int], window: int) -> list[_Stretch]:
    """Of the sequences that have tokens."""
    spans = [(0, 0)] * len(row.lengths)  # stretch of prefix keys of each sequence
    start = 0
    for group, count in zip(row.groups, prefix_counts, strict=False):
        used = min(group.length, window - 1)
        if count < used:
            raise RuntimeError(f"the cache kept {count} prefix keys, a window of {window} tokens needs {used}")
        for sequence in range(group.first_sequence, group.end_sequence):
            spans[sequence] = (start + count - used, start + count)
        start += count
    first = sum(prefix_counts)  # the row's own keys begin here
    stretches = []
    token = 0
    for length, span in zip(row.lengths, spans, strict=True):
        if length:
            stretches.append(_Stretch((token, token + length), span, (first + token, first + token + length)))
        token += length
    return stretches

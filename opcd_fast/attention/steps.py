"""Attention of one new token in each row of a batch: over the row's own keys, and over a prefix that all rows share.

The prefix lies there once. The queries of all rows, and the query heads that share keys, are folded into one product
with it; each row's own keys are attended for themselves, and the two are merged by logsumexp, as on a packed row (the
idea is Hydragen's, arXiv 2402.05099).

B rows, H_q and H_kv heads, G = H_q / H_kv, K own keys, P prefix keys, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opcd_fast.attention import backends, kernels, shapes
from opcd_fast.attention.dispatch import alike, merge_by_logsumexp
from opcd_fast.attention.rows import KeysAndValues


class Visible(NamedTuple):
    """What the new tokens see. None: all that is there."""

    bias: Tensor | None = None  # (B, K) added to the scores of own keys: 0 or -inf; every row sees one key at least
    prefix_bias: Tensor | None = None  # (B G, P) the same for the prefix; where it leaves nothing, has_prefix says so
    has_prefix: Tensor | None = None  # (B,) bool: rows that see a key of the prefix


EVERYTHING = Visible()


def step_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, prefix: KeysAndValues | None = None,
    visible: Visible = EVERYTHING, *, softcap: float | None = None, sink: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, H_q, 1, d) queries, (B, H_kv, K, d) own keys and values, (1, H_kv, P, d) the prefix's -> (B, 1, H_q, d).

    In the values' type; values may be narrower than keys. softcap: bound of the scores; sink: (H_q,) scores that take
    probability and give nothing. Not differentiable.
    """
    (rows, kv_heads), heads, width = key.shape[:2], query.shape[1], value.shape[-1]
    query = query.to(value.dtype)
    folded = query.reshape(rows, kv_heads, heads // kv_heads, -1)
    bias = None if visible.bias is None else _aligned(visible.bias, query.dtype)[:, None, None]
    if prefix is None and softcap is None and sink is None:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scale)
        return out.reshape(rows, 1, heads, -1)
    out, lse = _with_lse(folded, *alike(key, value, value.dtype), bias, scale, softcap)
    over: tuple[Tensor, ...] = ()
    if prefix is not None:
        everyone = folded.transpose(0, 1).reshape(1, kv_heads, -1, folded.shape[-1])  # (1, H_kv, B G, d)
        bias = None if visible.prefix_bias is None else _aligned(visible.prefix_bias, query.dtype)[None, None]
        over = tuple(
            x.unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2)  # (B, H_q, …)
            for x in _with_lse(everyone, *alike(*prefix, value.dtype), bias, scale, softcap)
        )
        if visible.has_prefix is not None:
            over = over[0], over[1].masked_fill(~visible.has_prefix[:, None], -torch.inf)
    merged = out.flatten(1, 2)
    if over or sink is not None:
        merged = merge_by_logsumexp(merged, lse.flatten(1, 2), *over, sink=sink, in_place=True)
    return merged[..., :width].unsqueeze(1)


def _aligned(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """In another type its rows begin at multiples of 8 elements, too: kernels of a device refuse others."""
    count = bias.shape[-1]
    return bias if bias.dtype == dtype else F.pad(bias.to(dtype), (0, -count % 8))[:, :count]


def _with_lse(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(b, H, n, d), (b, H, m, d) and what is added to scores -> (b, H, n, d), (b, H, n) float32 logsumexp."""
    need = backends.need_of(query, softcap=softcap)
    if shapes.only_shapes():
        return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    if need.device == "cpu" and softcap is None:
        return kernels.cpu_flash(query, key, value, False, scale, bias)
    if need.device == "cuda" and softcap is None and need.dtype != torch.float64:
        if bias is None and need.half_on_cuda and need.head_size <= 256:
            return kernels.flash(query, key, value, scale)
        return kernels.efficient(query, key, value, False, scale, bias)
    # Queries are few: their scores are small, and the values are read once either way.
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = torch.matmul(query.to(kind), key.to(kind).transpose(2, 3)).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores = scores.add_(bias)
    lse = scores.logsumexp(-1)
    return torch.matmul(scores.sub_(lse.unsqueeze(-1)).exp_(), value.to(kind)).to(query.dtype), lse

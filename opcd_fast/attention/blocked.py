"""Exact attention in blocks of scores, in plain PyTorch and float32: caps, windows, logsumexp and all gradients.

What runs where no kernel does. It never holds more than a few blocks of `BLOCK_BYTES` of scores, forward or backward,
and keeps the running maximum and sum of each query as flash attention does. A score is

    s = scale * q.k        or, with a softcap c,        s = c * tanh(scale * q.k / c)

Queries are the last of the keys' positions: query i of n sees, among m keys, those up to i + m - n if causal, and of
these the last `window`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd_fast.runtime import first_order

BLOCK_BYTES = 16 * 2**20  # of one block of scores; three or so exist at a time
_BLOCK_KEYS = 1024


@dataclass(frozen=True)
class _Shape:
    """What a score is, and which of them there are."""

    queries: int
    keys: int
    scale: float
    softcap: float | None
    causal: bool
    window: int | None

    def blocks(self, heads: int, size: int) -> Iterator[tuple[slice, list[slice]]]:
        """Blocks of queries, and for each the blocks of keys that some query in it sees."""
        width = min(self.keys, _BLOCK_KEYS)
        height = max(1, BLOCK_BYTES // (size * heads * max(width, 1)))
        shift = self.keys - self.queries
        for start in range(0, self.queries, height):
            end = min(start + height, self.queries)
            last = end + shift if self.causal else self.keys
            first = 0 if self.window is None else max(0, start + shift - self.window + 1)
            yield slice(start, end), [slice(k, min(k + width, last)) for k in range(first, last, width)]

    def scores(self, query: Tensor, key: Tensor, rows: slice, columns: slice) -> Tensor:
        """(H_kv, G, n', m'), -inf where a query does not see a key."""
        groups = query.shape[1]
        q = query[:, :, rows].flatten(1, 2)  # the heads that share keys, as more queries
        scores = torch.matmul(q, key[:, columns].transpose(1, 2)).mul_(self.scale)
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        scores = scores.unflatten(1, (groups, -1))
        if self.causal:
            at = torch.arange(rows.start, rows.stop, device=q.device).unsqueeze(1) + self.keys - self.queries
            place = torch.arange(columns.start, columns.stop, device=q.device)
            hidden = place > at
            if self.window is not None:
                hidden |= place <= at - self.window
            scores.masked_fill_(hidden, float("-inf"))
        return scores


class _Blocked(torch.autograd.Function):
    """query (H_kv, G, n, d), key (H_kv, m, d), value (H_kv, m, e) -> (H_kv, G, n, e), logsumexp (H_kv, G, n)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, shape: _Shape) -> tuple[Tensor, Tensor]:
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        lse = query.new_empty(query.shape[:3])
        heads = query.shape[0] * query.shape[1]
        for rows, column_blocks in shape.blocks(heads, query.element_size()):
            top = query.new_full((*query.shape[:2], rows.stop - rows.start), float("-inf"))
            total, weighted = torch.zeros_like(top), out[:, :, rows]
            for columns in column_blocks:
                scores = shape.scores(query, key, rows, columns)
                higher = torch.maximum(top, scores.amax(-1))
                # Rows that have seen no key yet: exp(-inf - 0) = 0, not exp(nan).
                base = higher.masked_fill(higher == float("-inf"), 0.0)
                shrink = (top - base).exp_()
                weights = scores.sub_(base.unsqueeze(-1)).exp_()
                total.mul_(shrink).add_(weights.sum(-1))
                part = torch.matmul(weights.flatten(1, 2), value[:, columns]).unflatten(1, (query.shape[1], -1))
                weighted.mul_(shrink.unsqueeze(-1)).add_(part)
                top = higher
            weighted.div_(total.unsqueeze(-1))
            lse[:, :, rows] = top + total.log()
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.shape = shape
        return out, lse

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        shape: _Shape = ctx.shape
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        # d s = p (d p - sum p d p + d lse), where sum p d p = out . d out
        constant = grad_lse - (grad_out * out).sum(-1)
        groups, heads = query.shape[1], query.shape[0] * query.shape[1]
        for rows, column_blocks in shape.blocks(heads, query.element_size()):
            outward = grad_out[:, :, rows].flatten(1, 2)
            for columns in column_blocks:
                scores = shape.scores(query, key, rows, columns)
                p = (scores - lse[:, :, rows].unsqueeze(-1)).exp_()
                grad_value[:, columns] += torch.matmul(p.flatten(1, 2).transpose(1, 2), outward)
                grad = torch.matmul(outward, value[:, columns].transpose(1, 2)).unflatten(1, (groups, -1))
                grad.add_(constant[:, :, rows].unsqueeze(-1)).mul_(p).mul_(shape.scale)
                if shape.softcap is not None:
                    # Hidden scores are -inf; their p is 0.
                    slope = 1.0 - scores.masked_fill_(p == 0, 0.0).div_(shape.softcap).square_()
                    grad.mul_(slope)
                flat = grad.flatten(1, 2)
                grad_query[:, :, rows] += torch.matmul(flat, key[:, columns]).unflatten(1, (groups, -1))
                grad_key[:, columns] += torch.matmul(flat.transpose(1, 2), query[:, :, rows].flatten(1, 2))
        return grad_query, grad_key, grad_value, None


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(1, H_q, n, d), (1, H_kv, m, d), (1, H_kv, m, e) -> (n, H_q, e) in query's dtype, (n, H_q) fp32 logsumexp.

    In float32, or float64 when the inputs are. Differentiable in query, key and value, through both results, once.
    m >= 1; if causal, m >= n. window: keys a query sees, itself included; needs causal. Raises ValueError otherwise.
    """
    (n, m), kv_heads = (query.shape[2], key.shape[2]), key.shape[1]
    if m < 1 or (causal and m < n) or (window is not None and (not causal or window < 1)):
        raise ValueError(f"attention of {n} queries to {m} keys, causal={causal}, window={window} is not defined")
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (x[0].to(kind) for x in (query, key, value))
    shape = _Shape(n, m, scale, softcap, causal, window)
    out, lse = _Blocked.apply(q.unflatten(0, (kv_heads, -1)), k, v, shape)
    return out.flatten(0, 1).transpose(0, 1).to(query.dtype), lse.flatten(0, 1).transpose(0, 1)

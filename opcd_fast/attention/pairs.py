"""Attention kernels as pairs of forward and backward, with the logsumexp in the caller's hands.

torch's attention keeps the logsumexp to itself between its forward and its backward. Where attention over several
stretches of keys is merged, the backward of each stretch needs the merged one, so these call the operators that
`scaled_dot_product_attention` is made of.

Shapes: queries (1, H_q, n, d), keys and values (1, H_kv, m, d), H_q a multiple of H_kv; outputs (n, H_q, d),
logsumexp (n, H_q) in float32 (float64 for float64 inputs), natural logarithm. Gradients have their inputs' shapes; the
pairs may return them in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from opcd_fast.attention.kernels import computed_in, cpu_flash, efficient, fold_heads, repeat_heads
from opcd_fast.attention.rows import PackedRow, from_grid, heads_first, to_grid, tokens_first
from opcd_fast.attention.shapes import FlashPair, only_shapes

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]  # of query, key, value


@dataclass(frozen=True, eq=False)
class Spans:
    """Stretches of queries, each against its own stretch of keys; none is empty."""

    queries: PackedRow
    keys: PackedRow
    causal: bool = False  # then both are the same row

    def slices(self) -> Iterator[tuple[slice, slice]]:
        for q, k in zip(pairwise(self.queries.bounds), pairwise(self.keys.bounds), strict=True):
            yield slice(*q), slice(*k)


def pair_for(query: Tensor) -> VarlenPair | DensePair | FlashPair:
    """The kernels for tensors like `query`."""
    if only_shapes():
        return FlashPair()
    if not query.is_cuda:
        return _CPU
    d = query.shape[-1]
    flash = query.dtype in (torch.float16, torch.bfloat16) and d <= 256 and d % 8 == 0
    if flash and torch.cuda.get_device_capability(query.device) >= (8, 0):
        return _FLASH
    return _EFFICIENT


# --- all stretches in one call ------------------------------------------------------------------------------


class VarlenPair:
    """The built-in flash kernels: one launch for all stretches, heads that share keys included."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """(output, logsumexp)."""
        q, k, v = map(tokens_first, (query, key, value))
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *self._shape(spans), False, scale=scale)
        return out, lse.transpose(0, 1)  # it comes as (H_q, n)

    def backward(
        self,
        grad_out: Tensor,  # (n, H_q, d)
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        spans: Spans,
        scale: float,
    ) -> Gradients:
        """Given output and logsumexp over more keys than these: this stretch's part of the gradients."""
        q, k, v = map(tokens_first, (query, key, value))
        lse = lse.transpose(0, 1).contiguous()
        # State of a random generator that only dropout would read.
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        grads = aten._flash_attention_backward(
            grad_out.contiguous(), q, k, v, out, lse, *self._shape(spans), rng_state, unused, scale=scale
        )
        of_query, of_key, of_value = map(heads_first, grads)
        return of_query, of_key, of_value

    @staticmethod
    def _shape(spans: Spans) -> tuple[Tensor, Tensor, int, int, float, bool]:
        queries, keys = spans.queries, spans.keys
        return queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest, 0.0, spans.causal


# --- dense calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DensePair:
    """Kernels for (B, H, T, d) with as many key heads as query heads; forward and backward as `VarlenPair`'s.

    Causal stretches, which have the same queries and keys, run as one right-padded batch; others one at a time, with
    the heads that share keys folded into the queries, since without a mask it does not matter where a query stands.
    """

    kernel: Callable[..., tuple[Tensor, Tensor]]
    backward_kernel: Callable[..., Gradients]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        query, key, value = map(computed_in, (query, key, value))
        if spans.causal:
            repeated = (query, repeat_heads(key, query), repeat_heads(value, query))
            out, lse = self.kernel(*(to_grid(x, spans.queries) for x in repeated), True, scale)
            return from_grid(out, spans.queries), from_grid(lse.unsqueeze(-1), spans.queries).squeeze(-1)
        outs, lses = [], []
        for at, keys in spans.slices():
            part = query[:, :, at]
            out, lse = self.kernel(fold_heads(part, key), key[:, :, keys], value[:, :, keys], False, scale)
            outs.append(tokens_first(out.reshape(part.shape)))
            lses.append(tokens_first(lse.reshape(part.shape[:3])))
        return torch.cat(outs), torch.cat(lses)

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        spans: Spans,
        scale: float,
    ) -> Gradients:
        lse = heads_first(lse.unsqueeze(-1))  # (1, H_q, n, 1); the others (1, H, ·, d)
        grad_out, out = computed_in(heads_first(grad_out)), computed_in(heads_first(out))
        query, key, value = map(computed_in, (query, key, value))
        if spans.causal:
            tensors = (grad_out, query, repeat_heads(key, query), repeat_heads(value, query), out, lse)
            *grids, lse_grid = (to_grid(x, spans.queries) for x in tensors)
            grads = self.backward_kernel(*grids, lse_grid.squeeze(-1), True, scale)
            of_query, of_key, of_value = (heads_first(from_grid(x, spans.queries)) for x in grads)
            return of_query, _sum_heads(of_key, key), _sum_heads(of_value, value)
        of_queries, of_keys, of_values = [], [], []
        for at, keys in spans.slices():
            folded = [fold_heads(x[:, :, at], key) for x in (grad_out, query, out, lse)]
            grads = self.backward_kernel(
                folded[0], folded[1], key[:, :, keys], value[:, :, keys], folded[2], folded[3].squeeze(-1), False, scale
            )
            of_queries.append(grads[0].reshape(query[:, :, at].shape))
            of_keys.append(grads[1])
            of_values.append(grads[2])
        return torch.cat(of_queries, 2), torch.cat(of_keys, 2), torch.cat(of_values, 2)


def _cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
    )


def _efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)  # as the kernel leaves it in forward
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # state of the generator that dropout would read
    of_query, of_key, of_value, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, None, out, lse, unused, unused, 0.0, [True, True, True, False], causal, scale=scale
    )
    return of_query, of_key, of_value


def _sum_heads(x: Tensor, like: Tensor) -> Tensor:
    """What `repeat_heads` does, backwards: (1, H_q, n, d) -> (1, H_kv, n, d)."""
    return x.unflatten(1, (like.shape[1], -1)).sum(2)


_CPU = DensePair(cpu_flash, _cpu_backward)
_EFFICIENT = DensePair(efficient, _efficient_backward)
_FLASH = VarlenPair()

"""Attention as flash kernels hold it, without its numbers: what a step would take on a GPU that is not here.

Forward keeps queries, keys, values, the output and the logsumexp. Backward makes the three gradients and, as
FlashAttention-2 does, dQ once in float32, the row sums of dO * O, and dK and dV once for every query head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from opcd_fast.kernels.reference import merge_attention

_ASSUMED: ContextVar[bool] = ContextVar("opcd_fast_flash_shapes", default=False)


@contextmanager
def flash_shapes() -> Iterator[None]:
    """In this block attention on packed rows and after shared prompts makes tensors of flash kernels' shapes, and no
    numbers. Layers whose window cuts keys off stay as they are."""
    token = _ASSUMED.set(True)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def only_shapes() -> bool:
    """Whether `flash_shapes` is in force."""
    return _ASSUMED.get()


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = FlashPair().forward(query)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor]:
        return FlashPair().backward(grad_out, *ctx.saved_tensors[:3])


def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """(1, H_q, n, d), (1, H_kv, m, d) -> (n, H_q, d), (n, H_q) float32: either phase of attention on a row."""
    return _Flash.apply(query, key, value)


class FlashPair:
    """As `attention.pairs.Pair`."""

    def forward(self, query: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
        _, heads, tokens, size = query.shape
        return query.new_empty(tokens, heads, size), query.new_empty(tokens, heads, dtype=torch.float32)

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *unused: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, heads, tokens, size = query.shape
        temporaries = [query.new_empty(tokens, heads, size + 1, dtype=torch.float32)]
        if key.shape[1] != heads:
            temporaries += [key.new_empty(2, key.shape[2], heads, size)]
        # Tokens first, as the kernels lay them out.
        grads = [x.new_empty(x.shape[2], x.shape[1], size).transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
        del temporaries
        return grads[0], grads[1], grads[2]


def merge(out_a: Tensor, *others: Any, out: Tensor | None = None, **options: Any) -> Tensor:
    """As `merge_attention`, whose kernel takes nothing beside its result."""
    if any(x is not None and x.requires_grad for x in (out_a, *others)):  # then it is not a kernel on a GPU either
        return merge_attention(out_a, *others, out=out, **options)
    return torch.empty_like(out_a) if out is None else out

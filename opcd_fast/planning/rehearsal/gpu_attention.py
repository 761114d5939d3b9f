"""What attention holds on a GPU, for a rehearsal that has none: shapes as flash kernels have them, no numbers.

Forward keeps queries, keys, values, the output and the logsumexp. Backward makes the three gradients and, as
FlashAttention-2 does, dQ once in float32, the row sums of dO * O, and dK and dV once for every query head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opcd_fast.attention import backends as attention_backends
from opcd_fast.attention import dispatch as attention
from opcd_fast.attention import tree as tree_attention
from opcd_fast.kernels.reference import merge_attention


class _Flash(torch.autograd.Function):
    """(1, H_q, n, d), (1, H_kv, m, d) -> (n, H_q, d), (n, H_q) float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _forward(query)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return _backward(query, key, value)


def _forward(query: Tensor) -> tuple[Tensor, Tensor]:
    _, heads, tokens, size = query.shape
    return query.new_empty(tokens, heads, size), query.new_empty(tokens, heads, dtype=torch.float32)


def _backward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, heads, tokens, size = query.shape
    temporaries = [query.new_empty(tokens, heads, size + 1, dtype=torch.float32)]
    if key.shape[1] != heads:
        temporaries += [key.new_empty(2, key.shape[2], heads, size)]
    # Tokens first, as the kernels lay them out.
    gradients = [x.new_empty(x.shape[2], x.shape[1], size).transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
    del temporaries
    return gradients[0], gradients[1], gradients[2]


class _Pair:
    """As `attention.pairs.Pair`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spans: Any, scale: float) -> tuple[Tensor, Tensor]:
        return _forward(query)

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(query, key, value)


def _phase_1(need: Any, packages: Any = None) -> Any:
    return attention_backends.Kernel("rehearsed", lambda query, key, value, *_: _Flash.apply(query, key, value))


def _phase_2(need: Any, packages: Any = None) -> Any:
    return attention_backends.Kernel("rehearsed", lambda query, key, value, *_: _Flash.apply(query, key, value))


def _merged(out_a: Tensor, *others: Any, in_place: bool = False, **options: Any) -> Tensor:
    if any(x.requires_grad for x in (out_a, *others)):  # then it is not a kernel there either
        return merge_attention(out_a, *others, **options)
    return out_a if in_place else torch.empty_like(out_a)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Packed attention and attention after shared prompts take memory as on a GPU while the block is open.

    Layers whose window cuts keys off keep the CPU's way, one sequence at a time. Sets attributes of modules: not for
    two threads at once.
    """
    changed: list[tuple[Any, str, Any]] = [
        (attention_backends, "phase_1", _phase_1),
        (attention_backends, "phase_2", _phase_2),
        (attention, "merge_by_logsumexp", _merged),
        (tree_attention, "pair_for", lambda query: _Pair()),
    ]
    saved = [(module, name, getattr(module, name)) for module, name, _ in changed]
    try:
        for module, name, value in changed:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)

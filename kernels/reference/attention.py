"""Attention over a union of key sets, from the attention over each and its logsumexp, in plain PyTorch.

For one query and one head, with l the logsumexp of its scores over a set of keys and o the attention over them, the
attention over the union of disjoint sets a and b is

    out = (exp(l_a) o_a + exp(l_b) o_b + 0) / (exp(l_a) + exp(l_b) + exp(sink))

A sink is a learned score per head that takes probability and gives nothing: a third set whose attention is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(
    out_a: Tensor,  # (n, H, d)
    lse_a: Tensor,  # (n, H) float32 (float64 with float64 outputs), natural logarithm
    out_b: Tensor | None = None,  # (n, H, d); None: no second set, which makes sense with a sink
    lse_b: Tensor | None = None,  # (n, H)
    *,
    sink: Tensor | None = None,  # (H,), any floating dtype
    has_keys_a: Tensor | None = None,  # (n,) bool: rows whose set a is not empty. None: all of them
    has_keys_b: Tensor | None = None,  # (n,) bool
    out: Tensor | None = None,  # (n, H, d) written and returned; may be out_a. None: a new tensor
    lse: Tensor | None = None,  # (n, H) written: logsumexp of the union, the sink included; may be lse_a. None: not
) -> Tensor:
    """The merged attention (n, H, d) in the dtype of out_a; weights and products in float32 (float64 if given).

    Inputs may have any strides. Whether a set is empty is told by has_keys_*, never by the value of its logsumexp:
    kernels give +inf, -inf, 0 or NaN there, and anything as output. Where all sets are empty the result is 0 with
    logsumexp -inf, or the sink's. Without out and lse it is differentiable in all inputs.
    """
    kind = torch.float64 if lse_a.dtype == torch.float64 else torch.float32
    sets = [(out_a, lse_a, has_keys_a)]
    if out_b is not None and lse_b is not None:
        sets.append((out_b, lse_b, has_keys_b))
    levels = [x.to(kind) if has is None else _where(has, x.to(kind), float("-inf")) for _, x, has in sets]
    if sink is not None:
        levels.append(sink.to(kind).expand_as(levels[0]))
    top = torch.stack([x.detach() for x in levels]).amax(0)
    top = top.masked_fill(top == float("-inf"), 0.0)  # nothing at all: exp(-inf - 0) = 0, not exp(nan)
    weights = [(x - top).exp() for x in levels]
    total = torch.stack(weights).sum(0)
    some = total > 0
    divisor = torch.where(some, total, 1.0)
    merged = torch.zeros_like(out_a, dtype=kind)
    for (part, _, has), weight in zip(sets, weights, strict=False):
        part = part.to(kind) if has is None else _where(has, part.to(kind), 0.0)
        merged = merged + (weight / divisor).unsqueeze(-1) * part
    if lse is not None:
        lse.copy_(torch.where(some, top + divisor.log(), float("-inf")))
    return merged.to(out_a.dtype) if out is None else out.copy_(merged)


def _where(has: Tensor, x: Tensor, other: float) -> Tensor:
    """`x` (n, ...) in rows that have keys, `other` elsewhere."""
    return torch.where(has.view(-1, *[1] * (x.ndim - 1)), x, other)

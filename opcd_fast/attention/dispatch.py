"""Attention on a packed row: sequences back to back, each of which also reads a shared prefix.

Two phases. Phase 1 is all queries of a group against its prefix, without a mask. Phase 2 is causal attention
inside each sequence. Softmax over the union of both key sets is their average weighted by exp(logsumexp); an
attention sink is a third set whose attention is 0 (`kernels.merge_attention`). Scores may be capped,
softcap * tanh(score / softcap), which changes nothing in this.

Layers whose sliding window cuts keys off do not merge: see `attention.windows`. Which kernels run is decided in
`attention.backends`.

Shapes: N tokens in the row, B sequences, T the longest of them, H_q and H_kv heads, d head size, P prefix
keys. Queries, keys and values come as (1, H, N, d), as transformers has them; results leave as (N, H_q, d).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opcd_fast.attention import backends, shapes
from opcd_fast.attention.rows import PackedRow, PrefixGroup, packed_row
from opcd_fast.attention.windows import windowed_attention
from opcd_fast.kernels.reference import attention as reference

__all__ = [
    "PackedCall",
    "PackedRow",
    "PrefixGroup",
    "attention_on_row",
    "causal_attention",
    "merge_by_logsumexp",
    "packed_row",
    "prefix_attention",
    "row_attention",
    "running",
    "windowed_attention",
]


@dataclass(frozen=True, eq=False)
class PackedCall:
    """One forward pass over a row.

    `prefix_keys[layer][group]` counts the keys the cache holds there; None for a layer that reads another's keys.
    """

    row: PackedRow
    prefix_keys: Sequence[Sequence[int] | None] | None = None
    layers_done: set[int] = field(default_factory=set)

    def counts(self, layer: int, past: int) -> Sequence[int]:
        """Prefix keys of each group in a layer that got `past` of them. RuntimeError when it should have others."""
        if self.prefix_keys is None:
            own: Sequence[int] | None = []
        else:
            own = self.prefix_keys[layer] if layer < len(self.prefix_keys) else None
        if own is None:
            # Which layer lent its keys shows in their number: it differs between full layers and windowed ones
            # unless the window holds all contexts, and then the counts are the same.
            lenders = [counts for counts in self.prefix_keys or () if counts is not None]
            own = next((counts for counts in lenders if sum(counts) == past), lenders[-1])
        if past != sum(own):
            raise RuntimeError(
                f"attention layer {layer} did not get its context: {past} prefix keys, expected {sum(own)}; "
                "the cache was dropped on the way"
            )
        return own


_CALL: ContextVar[PackedCall | None] = ContextVar("opcd_fast_packed_call", default=None)


@contextmanager
def running(call: PackedCall) -> Iterator[None]:
    """Make `call` the one that `attention_on_row` works on. A context variable: layers may drop keywords."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def attention_on_row(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, H, N, d) queries, prefix keys in front of the row's own keys.

    softcap: bound of the scores; s_aux: (H_q,) sinks. Values may be narrower than keys (DeepSeek-V3). Returns
    ((1, N, H_q, d_v), None). Raises RuntimeError when the layer's keys do not begin with its prefixes, and
    NotImplementedError for scores with a bias.
    """
    call = _CALL.get()
    if call is None:
        raise RuntimeError("packed attention was called outside of a packed forward pass")
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("packed attention has no position_bias; use path='concat'")
    layer: int = module.layer_idx  # type: ignore[assignment]
    counts = call.counts(layer, key.shape[2] - query.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast RoPE leaves queries and keys in fp32 while values are in the shorter type.
    query, key = query.to(value.dtype), key.to(value.dtype)
    width = value.shape[-1]
    if width < query.shape[-1]:  # kernels want one head size; the added zeros come out as zeros
        value = F.pad(value, (0, query.shape[-1] - width))
    out = row_attention(
        query, key, value, call.row, counts, scale, sliding_window, dropout, softcap=softcap, sink=s_aux
    )
    call.layers_done.add(layer)
    return out[..., :width].unsqueeze(0), None


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    prefix_counts: Sequence[int],
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
    *,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Each token attends its group's prefix and, causally, its own sequence. (1, H, N, d) -> (N, H_q, d).

    key, value: (1, H_kv, sum(prefix_counts) + N, d), one stretch of keys for each of `row.groups`. window:
    keys a token may see, itself included. softcap: bound of the scores. sink: (H_q,) scores that take probability
    and give nothing. Differentiable, in the sink too.
    """
    past = sum(prefix_counts)
    reach = max((p + t for p, t in zip(row.prefix_lengths, row.lengths, strict=True)), default=0)
    merging = past > 0 or sink is not None
    if window is not None and reach > window:
        out, lse = windowed_attention(
            query, key, value, row, prefix_counts, scale, window, dropout, softcap=softcap, with_lse=sink is not None
        )
        if lse is None:
            return out
        return merge_by_logsumexp(out, lse, sink=sink)
    own_key, own_value = key[:, :, past:], value[:, :, past:]
    out, lse = causal_attention(query, own_key, own_value, row, scale, dropout, softcap=softcap, with_lse=merging)
    if lse is None:
        return out

    in_place = not any(x.requires_grad for x in (out, lse, *(() if sink is None else (sink,))))
    pieces, start, done = [], 0, 0
    for group, count in zip(row.groups if past else (), prefix_counts if past else (), strict=True):
        tokens, keys = slice(group.first_token, group.end_token), slice(start, start + count)
        start, done = start + count, group.end_token
        second: tuple[Tensor, Tensor] | tuple[()] = ()
        # A group without a prefix is told by its length: kernels disagree on the logsumexp of no keys.
        if count and group.end_token > group.first_token:
            second = prefix_attention(query[:, :, tokens], key[:, :, keys], value[:, :, keys], scale, softcap)
        pieces.append(_merged(out[tokens], lse[tokens], second, sink, in_place))
    pieces.append(_merged(out[done:], lse[done:], (), sink, in_place))  # all of it in a row without prefixes
    return out if in_place else torch.cat(pieces)


def _merged(
    out: Tensor, lse: Tensor, second: tuple[Tensor, Tensor] | tuple[()], sink: Tensor | None, in_place: bool
) -> Tensor:
    if not out.shape[0] or (not second and sink is None):
        return out
    return merge_by_logsumexp(out, lse, *second, sink=sink, in_place=in_place)


def merge_by_logsumexp(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor | None = None,
    lse_b: Tensor | None = None,
    *,
    sink: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """Attention over the union of two key sets, from the attention over each.

    out_*: (n, H, d); lse_*: (n, H) float32, natural logarithm, of sets that are not empty; sink: (H,). Computed in
    fp32, returned in the dtype of out_a. In Triton on CUDA where nothing wants a gradient; else in PyTorch and, unless
    in_place writes the result over out_a, differentiable.
    """
    given = [x for x in (lse_a, out_b, lse_b, sink) if x is not None]
    merge = shapes.merge if shapes.only_shapes() else reference.merge_attention
    if backends.merge(backends.need_of(out_a.unsqueeze(0), *given)) == "Triton":
        from opcd_fast.kernels.triton import merge_attention as merge
    # Triton launches on the current GPU, whatever device its tensors are on.
    with torch.cuda.device(out_a.device) if out_a.is_cuda else nullcontext():
        return merge(out_a, lse_a, out_b, lse_b, sink=sink, out=out_a if in_place else None)


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Every query sees every key. (1, H_q, n, d), (1, H_kv, P, d) -> (n, H_q, d), (n, H_q) float32 logsumexp.

    P >= 1. Differentiable, through both results.
    """
    need = backends.need_of(query, key, value, softcap=softcap)
    return backends.phase_1(need).run(query, key, value, scale, softcap)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    scale: float,
    dropout: float = 0.0,
    *,
    softcap: float | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Tokens see earlier tokens of their own sequence. (1, H, N, d) -> (N, H_q, d).

    with_lse: also the logsumexp (N, H_q), float32. Differentiable, through both results.
    """
    need = backends.need_of(query, key, value, softcap=softcap, dropout=dropout)
    kernel = backends.phase_2(backends.for_gradients(need, through_lse=with_lse))
    out, lse = kernel.run(query, key, value, row, scale, softcap, dropout, with_lse)
    return out, lse if with_lse else None

"""Attention on a packed row: sequences back to back, each of which also reads a shared prefix.

Two phases. Phase 1 is all queries of a group against its prefix, without a mask. Phase 2 is causal attention
inside each sequence. Softmax over the union of both key sets is their average weighted by exp(logsumexp); an
attention sink is a third set whose attention is 0 (`kernels.merge_attention`). Scores may be capped,
softcap * tanh(score / softcap), which changes nothing in this. So a prefix's keys and values are read where they lie,
and never put together with the row's.

Layers whose sliding window cuts keys off do not merge: see `attention.windows`. Which kernels run is decided in
`attention.backends`.

Shapes: N tokens in the row, B sequences, T the longest of them, H_q and H_kv heads, d head size, P prefix
keys. Queries, keys and values come as (1, H, N, d), as transformers has them; results leave as (N, H_q, d).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opcd_fast.attention import backends, shapes
from opcd_fast.attention.rows import KeysAndValues, PackedRow
from opcd_fast.attention.windows import windowed_attention
from opcd_fast.kernels.reference import attention as reference

Prefixes = Callable[[torch.nn.Module, Tensor], Sequence[KeysAndValues]]
"""Of an attention layer, and its keys of the row: keys and values of each group's prefix, where they lie."""


@dataclass(frozen=True, eq=False)
class PackedCall:
    """One forward pass over a row. prefixes: None for a row without groups."""

    row: PackedRow
    prefixes: Prefixes | None = None
    layers_done: set[int] = field(default_factory=set)

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
        softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """transformers' attention interface: (1, H, N, d) queries, and the row's own keys and values.

        softcap: bound of the scores; s_aux: (H_q,) sinks. Values may be narrower than keys (DeepSeek-V3). Returns
        ((1, N, H_q, d_v), None). Raises RuntimeError for keys that are not one for each token or whose prefix is not
        there, and NotImplementedError for scores with a bias.
        """
        if kwargs.get("position_bias") is not None:
            raise NotImplementedError("packed attention has no position_bias; use path='concat'")
        layer: int = module.layer_idx  # type: ignore[assignment]
        check_keys(layer, query, key, self.row.bounds[-1])
        dtype, width = value.dtype, value.shape[-1]
        prefixes = [] if self.prefixes is None else [alike(*x, dtype) for x in self.prefixes(module, key)]
        _check_context(layer, self.row, prefixes, sliding_window)
        key, value = alike(key, value, dtype)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = row_attention(
            query.to(dtype), key, value, self.row, prefixes, scale, sliding_window, dropout, softcap=softcap, sink=s_aux
        )
        self.layers_done.add(layer)
        return out[..., :width].unsqueeze(0), None


def check_keys(layer: int, query: Tensor, key: Tensor, tokens: int) -> None:
    """RuntimeError unless queries and keys are those of a row's `tokens` tokens."""
    if not query.shape[2] == key.shape[2] == tokens:
        raise RuntimeError(
            f"attention layer {layer} got {query.shape[2]} queries and {key.shape[2]} keys for a row of {tokens} tokens"
        )


def _check_context(layer: int, row: PackedRow, prefixes: Sequence[KeysAndValues], window: int | None) -> None:
    """RuntimeError unless a layer got each group's whole prefix, or what a window that cuts keys off sees of it."""
    needed = [group.length for group in row.groups]
    got = [keys.shape[2] for keys, _ in prefixes]
    if window is not None and row.reach > window:
        needed = [min(length, window - 1) for length in needed]
        got = [min(kept, window - 1) for kept in got]
    if got != needed:
        raise RuntimeError(f"attention layer {layer} did not get its context: {got} prefix keys, expected {needed}")


def alike(key: Tensor, value: Tensor, dtype: torch.dtype) -> KeysAndValues:
    """Both in one type and of one size, as kernels want them; what is so already is not copied.

    Under autocast RoPE leaves keys in fp32 while values are in the shorter type. Zeros added to narrower values come
    out as zeros.
    """
    key, value = key.to(dtype), value.to(dtype)
    narrower = key.shape[-1] - value.shape[-1]
    return key, F.pad(value, (0, narrower)) if narrower > 0 else value


def row_attention(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, prefixes: Sequence[KeysAndValues], scale: float,
    window: int | None = None, dropout: float = 0.0, *, softcap: float | None = None, sink: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each token attends its group's prefix and, causally, its own sequence. (1, H, N, d) -> (N, H_q, d).

    key, value: (1, H_kv, N, d). prefixes: (1, H_kv, P, d) each, one for each of `row.groups`; a window that cuts keys
    off needs their last window - 1 tokens. window: keys a token may see, itself included. softcap: bound of the scores.
    sink: (H_q,) scores that take probability and give nothing. Differentiable, in the prefixes and the sink too.
    """
    if window is not None and row.reach > window:
        out, lse = windowed_attention(
            query, key, value, row, prefixes, scale, window, dropout, softcap=softcap, with_lse=sink is not None
        )
        return out if lse is None else merge_by_logsumexp(out, lse, sink=sink)
    merging = bool(prefixes) or sink is not None
    out, lse = causal_attention(query, key, value, row, scale, dropout, softcap=softcap, with_lse=merging)
    if lse is None:
        return out

    inputs = (out, lse, *(x for prefix in prefixes for x in prefix), *(() if sink is None else (sink,)))
    in_place = not any(x.requires_grad for x in inputs)

    def merged(first: int, end: int, prefix: KeysAndValues | None = None) -> Tensor:
        if first == end or (prefix is None and sink is None):
            return out[first:end]
        over = () if prefix is None else prefix_attention(query[:, :, first:end], *prefix, scale, softcap)
        return merge_by_logsumexp(out[first:end], lse[first:end], *over, sink=sink, in_place=in_place)

    pieces, done = [], 0
    for group, prefix in zip(row.groups, prefixes, strict=True):
        pieces += [merged(done, group.first_token), merged(group.first_token, group.end_token, prefix)]
        done = group.end_token
    pieces.append(merged(done, row.bounds[-1]))
    return out if in_place else torch.cat(pieces)


def merge_by_logsumexp(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor | None = None, lse_b: Tensor | None = None, *,
    sink: Tensor | None = None, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """Attention over the union of two key sets, from the attention over each.

    out_*: (n, H, d); lse_*: (n, H) float32, natural logarithm, of sets that are not empty; sink: (H,). Computed in
    fp32, returned in the dtype of out_a. In Triton on CUDA where nothing wants a gradient; else in PyTorch and, unless
    in_place writes the result over out_a, differentiable.
    """
    given = [x for x in (lse_a, out_b, lse_b, sink) if x is not None]
    need = backends.need_of(out_a.unsqueeze(0), *given)
    merge: Callable[..., Tensor] = reference.merge_attention if need.gradient else _weighted
    if shapes.only_shapes():
        merge = shapes.merge
    elif backends.merge(need) == "Triton":
        from opcd_fast.kernels.triton import merge_attention as merge
    # Triton launches on the current GPU, whatever device its tensors are on.
    with torch.cuda.device(out_a.device) if out_a.is_cuda else nullcontext():
        return merge(out_a, lse_a, out_b, lse_b, sink=sink, out=out_a if in_place else None)


def _weighted(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor | None, lse_b: Tensor | None, *, sink: Tensor | None, out: Tensor | None
) -> Tensor:
    """`reference.merge_attention` of sets that are not empty (lse_b may be -inf) in a third of its operations."""
    merged, lse = out_a.to(lse_a.dtype), lse_a
    if out_b is not None and lse_b is not None:
        merged = torch.lerp(merged, out_b.to(lse.dtype), torch.sigmoid(lse_b - lse_a).unsqueeze(-1))
        lse = lse_a if sink is None else torch.logaddexp(lse_a, lse_b)
    if sink is not None:
        merged = merged * torch.sigmoid(lse - sink.to(lse.dtype)).unsqueeze(-1)
    return merged.to(out_a.dtype) if out is None else out.copy_(merged)


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Every query sees every key. (1, H_q, n, d), (1, H_kv, P, d) -> (n, H_q, d), (n, H_q) float32 logsumexp.

    P >= 1. Differentiable, through both results.
    """
    need = backends.need_of(query, key, value, softcap=softcap)
    return backends.phase_1(need).run(query, key, value, scale, softcap)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float, dropout: float = 0.0, *,
    softcap: float | None = None, with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Tokens see earlier tokens of their own sequence. (1, H, N, d) -> (N, H_q, d).

    with_lse: also the logsumexp (N, H_q), float32. Differentiable, through both results.
    """
    kernel = backends.phase_2(backends.need_of(query, key, value, softcap=softcap, dropout=dropout, with_lse=with_lse))
    out, lse = kernel.run(query, key, value, row, scale, softcap, dropout, with_lse)
    return out, lse if with_lse else None

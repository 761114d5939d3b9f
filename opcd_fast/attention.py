"""Attention on a packed row: sequences back to back, each of which also reads a shared prefix.

Two phases. Phase 1 is all queries of a group against its prefix, without a mask. Phase 2 is causal attention
inside each sequence. Softmax over the union of both key sets is their average weighted by exp(logsumexp):

    out = (exp(l1) out1 + exp(l2) out2) / (exp(l1) + exp(l2))

Layers whose sliding window cuts keys off do not merge: there each sequence sees the last W - 1 keys of its
prefix in one windowed call.

Shapes: N tokens in the row, B sequences, T the longest of them, H_q and H_kv heads, d head size, P prefix
keys. Queries, keys and values come as (1, H, N, d), as transformers has them; results leave as (N, H_q, d).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class PrefixGroup:
    """A run of sequences in the row that continue the same prefix of `length` tokens."""

    first_sequence: int
    end_sequence: int
    first_token: int
    end_token: int
    length: int


@dataclass(frozen=True, eq=False)
class PackedRow:
    """Where the sequences of a row begin and end."""

    lengths: tuple[int, ...]  # tokens of each sequence
    cu_seqlens: Tensor  # (B + 1,) int32, on the row's device
    groups: tuple[PrefixGroup, ...] = ()  # empty: no sequence has a prefix

    @functools.cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @functools.cached_property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    @functools.cached_property
    def sequence_of_token(self) -> Tensor:
        """(N,) int64."""
        device = self.cu_seqlens.device
        counts = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=device), counts)

    @functools.cached_property
    def offset_of_token(self) -> Tensor:
        """(N,) int64, position inside its own sequence."""
        starts = self.cu_seqlens[:-1].long()
        return torch.arange(sum(self.lengths), device=starts.device) - starts[self.sequence_of_token]

    @functools.cached_property
    def slot_of_token(self) -> Tensor:
        """(N,) int64, position in a flattened right-padded (B, T) grid."""
        return self.sequence_of_token * self.longest + self.offset_of_token

    @property
    def prefix_lengths(self) -> list[int]:
        """Context tokens in front of each sequence."""
        lengths = [0] * len(self.lengths)
        for group in self.groups:
            lengths[group.first_sequence : group.end_sequence] = [group.length] * (
                group.end_sequence - group.first_sequence
            )
        return lengths


def packed_row(cu_seqlens: Tensor, tokens: int, device: torch.device) -> PackedRow:
    """The row of `tokens` tokens that `cu_seqlens` (B + 1,) of any integer type divides.

    Sequences may be empty, the row may not. Raises ValueError when cu_seqlens does not rise from 0 to
    `tokens`.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens: expected integers of shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if tokens == 0:
        raise ValueError("input_ids: no tokens at all")
    bounds = cu_seqlens.tolist()
    lengths = tuple(end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True))
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens: must rise from 0 to the {tokens} tokens of input_ids, got {bounds[:4]}…{bounds[-1]}"
        )
    return PackedRow(lengths, cu_seqlens.to(device=device, dtype=torch.int32))


# --- the function transformers calls ------------------------------------------------------------------------


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, H, N, d) queries, prefix keys in front of the row's own keys.

    Returns ((1, N, H_q, d), None). Raises RuntimeError when the layer's keys do not begin with its prefixes,
    and NotImplementedError for scores that are capped, have sinks or a bias.
    """
    call = _CALL.get()
    if call is None:
        raise RuntimeError("packed attention was called outside of a packed forward pass")
    refused = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if refused:
        raise NotImplementedError(f"packed attention has no {refused[0]}; use path='concat'")
    layer: int = module.layer_idx  # type: ignore[assignment]
    counts = call.counts(layer, key.shape[2] - query.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast RoPE leaves queries and keys in fp32 while values are in the shorter type.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = row_attention(query, key, value, call.row, counts, scale, sliding_window, dropout)
    call.layers_done.add(layer)
    return out.unsqueeze(0), None


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    prefix_counts: Sequence[int],
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Each token attends its group's prefix and, causally, its own sequence. (1, H, N, d) -> (N, H_q, d).

    key, value: (1, H_kv, sum(prefix_counts) + N, d), one stretch of keys for each of `row.groups`. window:
    keys a token may see, itself included. Differentiable when no group has a prefix.
    """
    past = sum(prefix_counts)
    own_key, own_value = key[:, :, past:], value[:, :, past:]
    reach = max((p + t for p, t in zip(row.prefix_lengths, row.lengths, strict=True)), default=0)
    if window is not None and reach > window:
        return windowed_attention(query, key, value, row, prefix_counts, scale, window, dropout)
    if past == 0:
        return causal_attention(query, own_key, own_value, row, scale, dropout)[0]

    out, lse = causal_attention(query, own_key, own_value, row, scale, with_lse=True)
    assert lse is not None
    start = 0
    for group, count in zip(row.groups, prefix_counts, strict=True):
        # A group without a prefix is told by its length: kernels disagree on the logsumexp of no keys.
        if count and group.end_token > group.first_token:
            tokens, keys = slice(group.first_token, group.end_token), slice(start, start + count)
            prefix_out, prefix_lse = prefix_attention(query[:, :, tokens], key[:, :, keys], value[:, :, keys], scale)
            out[tokens] = merge_by_logsumexp(out[tokens], lse[tokens], prefix_out, prefix_lse)
        start += count
    return out


def merge_by_logsumexp(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Attention over the union of two key sets, from the attention over each.

    out_*: (n, H, d); lse_*: (n, H) float32, natural logarithm, finite. Computed in fp32, returned in the
    dtype of out_a.
    """
    weight_b = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    return torch.lerp(out_a.float(), out_b.float(), weight_b).to(out_a.dtype)


# --- phase 1: all queries against the prefix ----------------------------------------------------------------


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query sees every key. (1, H_q, n, d), (1, H_kv, P, d) -> (n, H_q, d), (n, H_q) float32 logsumexp.

    No gradient. P >= 1.
    """
    heads, tokens = query.shape[1], query.shape[2]
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, scale=scale)
    elif _flash_fits(query):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)
    else:
        # The memory-efficient kernel wants as many key heads as query heads: fold the heads that share keys
        # into the tokens rather than repeat the prefix.
        folded = query.reshape(1, key.shape[1], -1, query.shape[-1])
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(folded, key, value, None, True, scale=scale)
        out = out.reshape(1, heads, tokens, -1)
        lse = lse[:, :, : folded.shape[2]].reshape(1, heads, tokens)
    return out[0].transpose(0, 1), lse[0, :, :tokens].transpose(0, 1)


# --- phase 2: causal attention inside each sequence ---------------------------------------------------------


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    scale: float,
    dropout: float = 0.0,
    *,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Tokens see earlier tokens of their own sequence. (1, H, N, d) -> (N, H_q, d).

    with_lse: also the logsumexp (N, H_q), float32. Differentiable, unless the logsumexp is asked for.
    """
    if dropout == 0.0 and _flash_fits(query) and _varlen_ready():
        return _varlen(query, key, value, row.cu_seqlens, row.cu_seqlens, row.longest, row.longest, scale, -1, with_lse)

    dtype = query.dtype
    if query.device.type == "cpu":
        # On CPUs without bf16 units the half-precision backward is 3-4 times slower than casting (measured),
        # and nothing is lost in accuracy. These are the suffixes only, never the prefix.
        query, key, value = query.float(), key.float(), value.float()
    q, k, v = (_to_grid(x, row) for x in (query, key, value))  # (B, H, T, d)
    if not with_lse:
        if q.is_cuda:
            k, v = _repeat_heads(k, q), _repeat_heads(v, q)
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        return _from_grid(out, row).to(dtype), None
    if q.is_cuda:
        k, v = _repeat_heads(k, q), _repeat_heads(v, q)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    lse = lse[:, :, : row.longest].unsqueeze(-1)
    return _from_grid(out, row).to(dtype), _from_grid(lse, row).squeeze(-1)


def _to_grid(x: Tensor, row: PackedRow) -> Tensor:
    """(1, H, N, d) -> (B, H, T, d), zeros after the end of a sequence."""
    tokens = x[0].transpose(0, 1)  # (N, H, d)
    shape = (len(row.lengths), row.longest, *tokens.shape[1:])
    if row.ragged:
        grid = tokens.new_zeros(shape[0] * shape[1], *tokens.shape[1:])
        tokens = grid.index_copy(0, row.slot_of_token, tokens)
    return tokens.reshape(shape).transpose(1, 2)


def _from_grid(x: Tensor, row: PackedRow) -> Tensor:
    """(B, H, T, d) -> (N, H, d)."""
    flat = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
    return flat.index_select(0, row.slot_of_token) if row.ragged else flat


def _repeat_heads(x: Tensor, like: Tensor) -> Tensor:
    return x.repeat_interleave(like.shape[1] // x.shape[1], dim=1)


# --- sliding windows ----------------------------------------------------------------------------------------


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    prefix_counts: Sequence[int],
    scale: float,
    window: int,
    dropout: float = 0.0,
) -> Tensor:
    """As `row_attention`, where the window cuts keys off. One call over [end of the prefix, sequence] each.

    Raises RuntimeError when the cache kept fewer prefix keys than the window reaches back to.
    """
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
    stretches = []  # (query start, query end, prefix start, prefix end) of the sequences that have tokens
    token = 0
    for length, (begin, end) in zip(row.lengths, spans, strict=True):
        if length:
            stretches.append((token, token + length, begin, end))
        token += length

    if dropout == 0.0 and _flash_fits(query) and _varlen_ready():
        device = query.device
        index = torch.cat(
            [
                torch.arange(a, b, device=device)
                for q0, q1, p0, p1 in stretches
                for a, b in ((p0, p1), (first + q0, first + q1))
            ]
        )
        sizes = [q1 - q0 + p1 - p0 for q0, q1, p0, p1 in stretches]
        cu_q = torch.tensor([0] + [q1 for _, q1, _, _ in stretches], dtype=torch.int32, device=device)
        cu_k = torch.tensor([0, *sizes], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        key, value = key.index_select(2, index), value.index_select(2, index)
        return _varlen(query, key, value, cu_q, cu_k, row.longest, max(sizes), scale, window - 1, False)[0]

    pieces = []
    for q0, q1, p0, p1 in stretches:
        # One sequence at a time: a batch of them would copy the window's keys for each.
        k = torch.cat([key[:, :, p0:p1], key[:, :, first + q0 : first + q1]], dim=2)
        v = torch.cat([value[:, :, p0:p1], value[:, :, first + q0 : first + q1]], dim=2)
        at = torch.arange(p1 - p0, k.shape[2], device=k.device).unsqueeze(1)  # place of each query among the keys
        place = torch.arange(k.shape[2], device=k.device)
        seen = (place <= at) & (place > at - window)  # (t, keys)
        out = F.scaled_dot_product_attention(
            query[:, :, q0:q1],
            _repeat_heads(k, query),
            _repeat_heads(v, query),
            attn_mask=seen,
            dropout_p=dropout,
            scale=scale,
        )
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


# --- CUDA kernels -------------------------------------------------------------------------------------------


def _flash_fits(query: Tensor) -> bool:
    """The built-in flash kernels: half precision, compute capability 8 and up, head sizes they have."""
    d = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and d <= 256
        and d % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@functools.cache
def _varlen_ready() -> bool:
    """Whether this torch's varlen_attn takes windows and shared key heads (2.10 did not)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
    back: int,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """torch's varlen kernel, causal, seeing `back` earlier keys (-1: all); queries end where keys end."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, d)
    out = varlen_attn(
        q,
        k,
        v,
        cu_q,
        cu_k,
        longest_q,
        longest_k,
        return_aux=AuxRequest(lse=True) if with_lse else None,
        scale=scale,
        window_size=(back, 0),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    if not with_lse:
        return out, None  # type: ignore[return-value]
    out, lse = out
    # Documented as (N, H), returned as (H, N) by the releases seen so far.
    if lse.shape[0] == q.shape[1] and (lse.shape[0] != lse.shape[1] or _lse_has_heads_first(q.device, q.dtype)):
        lse = lse.transpose(0, 1)
    return out, lse


@functools.cache
def _lse_has_heads_first(device: torch.device, dtype: torch.dtype) -> bool:
    """How varlen_attn lays out its logsumexp, asked with shapes that cannot be confused (for N = H)."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    x = torch.zeros(3, 2, 16, device=device, dtype=dtype)
    bounds = torch.tensor([0, 3], dtype=torch.int32, device=device)
    _, lse = varlen_attn(x, x, x, bounds, bounds, 3, 3, return_aux=AuxRequest(lse=True), window_size=(-1, 0))
    return lse.shape[0] == 2

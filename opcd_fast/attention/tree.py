"""Attention on a packed row in which continuations share their prompt: a prompt's tokens occur once, for all of them.

A continuation ("child") attends all of its prompt's keys and, causally, its own. Its two phases are merged by
logsumexp, as in `opcd_fast.attention`, and here with gradients. The backward pass of attention needs, for every
stretch of keys,

    P = exp(S - lse),   dV = P^T dO,   dS = P * (dO V^T - rowsum(dO * O))

(FlashAttention, arXiv 2205.14135, appendix B.4). With the MERGED output and logsumexp for O and lse, P is the weight
among the keys of both phases, so that each phase's backward kernel gives its part of the exact gradient: dQ adds up,
and a prompt's dK and dV are sums over all of its children. The kernels are those of `opcd_fast.attention.pairs`.

Layers whose sliding window cuts keys off do not merge: there each child reads the end of its prompt in one windowed
call.

Shapes: N tokens, R of them in roots (prompts and sequences that stand alone), C = N - R in children, H_q and H_kv
heads, d head size, S segments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opcd_fast.attention.dispatch import alike, check_keys, row_attention
from opcd_fast.attention.pairs import Spans, pair_for
from opcd_fast.attention.rows import PackedRow, PrefixGroup, on_device, packed_row, row_of
from opcd_fast.runtime import first_order


@dataclass(frozen=True, eq=False)
class TreeRow:
    """Where roots and children lie once tokens are in `order`: prompts, sequences that stand alone, children.

    No segment is empty. `children.groups` has one group for each prompt, in the order of the prompts.
    """

    roots: PackedRow
    children: PackedRow
    order: Tensor  # (N,) int64: place in the caller's row of each token
    back: Tensor  # (N,) int64: place in this row of each of the caller's tokens

    @functools.cached_property
    def root_tokens(self) -> int:
        return sum(self.roots.lengths)

    @functools.cached_property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt that has children."""
        return tuple(group.length for group in self.children.groups)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, its prompt included."""
        return max(self.roots.longest, self.children.reach)

    @functools.cached_property
    def positions(self) -> Tensor:
        """(N,) int64: place of each token in its sequence, its prompt included."""
        return torch.cat([self.roots.offset_of_token, self.children.position_of_token])

    @functools.cached_property
    def own_spans(self) -> Spans:
        """Every child against itself."""
        return Spans(self.children, self.children, causal=True)

    @functools.cached_property
    def prompt_spans(self) -> Spans:
        """All children of a prompt against the prompt."""
        of_prompts = [group.end_token - group.first_token for group in self.children.groups]
        return Spans(row_of(of_prompts, self.order.device), row_of(self.prompt_lengths, self.order.device))


def tree_row(cu_seqlens: Tensor, parent: Tensor, tokens: int, device: torch.device) -> TreeRow:
    """The row of `tokens` tokens in which segment i continues segment parent[i], or nothing where that is -1.

    cu_seqlens: (S + 1,) integers rising from 0 to `tokens`; parent: (S,) integers. Raises ValueError where parent does
    not name an earlier segment, or one that is a continuation itself, or a prompt without tokens.
    """
    whole = packed_row(cu_seqlens, tokens, device)
    lengths, parents = whole.lengths, _parents(parent, whole.lengths)
    # Empty segments need no attention. A prompt all of whose children are empty is read by nobody.
    filled = [i for i in range(len(lengths)) if lengths[i]]
    members: dict[int, list[int]] = {}
    for i in filled:
        if parents[i] >= 0:
            members.setdefault(parents[i], []).append(i)
    prompts = sorted(members)
    alone = [i for i in filled if parents[i] < 0 and i not in members]
    children = [i for prompt in prompts for i in members[prompt]]

    groups, sequence, token = [], 0, 0
    for prompt in prompts:
        end_sequence = sequence + len(members[prompt])
        end_token = token + sum(lengths[i] for i in members[prompt])
        groups.append(PrefixGroup(sequence, end_sequence, token, end_token, lengths[prompt]))
        sequence, token = end_sequence, end_token

    starts = whole.bounds
    arranged = [*prompts, *alone, *children]
    order = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in arranged])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens))
    return TreeRow(
        row_of((lengths[i] for i in (*prompts, *alone)), device),
        row_of((lengths[i] for i in children), device, groups),
        on_device(order, device),
        on_device(back, device),
    )


def _parents(parent: Tensor, lengths: tuple[int, ...]) -> list[int]:
    if parent.shape != (len(lengths),) or parent.is_floating_point() or parent.dtype == torch.bool:
        raise ValueError(
            f"parent: expected {len(lengths)} integers, one for each segment of cu_seqlens, "
            f"got {parent.dtype} {tuple(parent.shape)}"
        )
    parents = parent.tolist()
    for i, which in enumerate(parents):
        if not -1 <= which < i:
            raise ValueError(
                f"parent[{i}] is {which}: expected -1 for a segment that continues nothing, or the index of its "
                f"prompt, which must come before it (0 to {i - 1})"
            )
        if which >= 0 and parents[which] != -1:
            raise ValueError(
                f"parent[{i}] is {which}, which continues segment {parents[which]} itself; prompts are one level deep"
            )
        if which >= 0 and not lengths[which]:
            raise ValueError(f"parent[{i}] is {which}, a prompt without tokens; use -1 for a segment with no prompt")
    return parents


# --- the function transformers calls ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TreeCall:
    """One forward pass over a row with shared prompts."""

    row: TreeRow
    layers_done: set[int] = field(default_factory=set)

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """transformers' attention interface: (1, H, N, d) queries, keys and values in the tree row's order.

        Values may be narrower than keys. Returns ((1, N, H_q, d_v), None). NotImplementedError for dropout and for
        scores that are capped, have sinks or a bias; RuntimeError for keys that are not the row's own.
        """
        refused = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if dropout:
            refused.append("dropout")
        if refused:
            raise NotImplementedError(f"attention with shared prompts has no {refused[0]}; use packed_hidden_states")
        layer: int = module.layer_idx  # type: ignore[assignment]
        check_keys(layer, query, key, self.row.order.numel())
        dtype, width = value.dtype, value.shape[-1]
        key, value = alike(key, value, dtype)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = tree_attention(query.to(dtype), key, value, self.row, scale, sliding_window)
        self.layers_done.add(layer)
        return out[..., :width].unsqueeze(0), None


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, row: TreeRow, scale: float, window: int | None = None
) -> Tensor:
    """Each token attends its prompt and, causally, its own segment. (1, H, N, d) -> (N, H_q, d), differentiable.

    query, key and value are in the order of `row`. window: keys a token may see, itself included.
    """
    roots, prompts = row.root_tokens, sum(row.prompt_lengths)
    root_key, root_value = key[:, :, :roots], value[:, :, :roots]
    out = row_attention(query[:, :, :roots], root_key, root_value, row.roots, [], scale, window)
    if not row.children.lengths:
        return out
    query, key, value = query[:, :, roots:], key[:, :, roots:], value[:, :, roots:]
    prompt_key, prompt_value = root_key[:, :, :prompts], root_value[:, :, :prompts]
    if window is not None and row.children.reach > window:
        prefixes = list(zip(*(x.split(list(row.prompt_lengths), 2) for x in (prompt_key, prompt_value)), strict=True))
        of_children = row_attention(query, key, value, row.children, prefixes, scale, window)
    else:
        of_children = _AttentionAfterPrompts.apply(query, key, value, prompt_key, prompt_value, row, scale)
    return torch.cat([out, of_children])


class _AttentionAfterPrompts(torch.autograd.Function):
    """Children (1, H, C, d) after their prompts' keys and values -> (C, H_q, d)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, row: TreeRow,
        scale: float,
    ) -> Tensor:  # fmt: skip
        pair = pair_for(query)
        own, own_lse = pair.forward(query, key, value, row.own_spans, scale)
        prompt, prompt_lse = pair.forward(query, prompt_key, prompt_value, row.prompt_spans, scale)
        weight = torch.sigmoid(prompt_lse - own_lse).unsqueeze(-1)
        out = torch.lerp(own.to(weight.dtype), prompt.to(weight.dtype), weight).to(query.dtype)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, out, torch.logaddexp(own_lse, prompt_lse))
        ctx.row, ctx.scale = row, scale
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        query, key, value, prompt_key, prompt_value, out, lse = ctx.saved_tensors
        row, scale, pair = ctx.row, ctx.scale, pair_for(query)
        # Both get the logsumexp over the keys of both phases, and the output of both.
        from_own, of_key, of_value = pair.backward(grad_out, query, key, value, out, lse, row.own_spans, scale)
        from_prompt, of_prompt_key, of_prompt_value = pair.backward(
            grad_out, query, prompt_key, prompt_value, out, lse, row.prompt_spans, scale
        )
        of_query = (from_own + from_prompt).to(query.dtype)
        of_keys = (of_key, of_value, of_prompt_key, of_prompt_value)
        return of_query, *(grad.to(query.dtype) for grad in of_keys), None, None

"""The ways to run packed sequences after their contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn

from opcd_fast.attention import PackedCall, PackedRow, PrefixGroup, on_device, row_of
from opcd_fast.models import forward_on_row, moving_rope, padded_forward, seam
from opcd_fast.models.caches import expanded_cache, prefix_cache, unread_layers
from opcd_fast.teacher.prefix import SharedPrefix


def merge_forward(
    body: nn.Module, prefixes: Mapping[int, SharedPrefix], input_ids: Tensor, row: PackedRow, index: Sequence[int]
) -> Tensor:
    """Packed ids (N,) after their prefixes -> (N, D). RuntimeError if a layer did not use its prefix.

    prefixes: by context, at least those that `index` (B,) names.
    """
    order = sorted(range(len(index)), key=lambda sequence: index[sequence])
    back: Tensor | None = None
    if order != list(range(len(index))):
        # Sequences of one context must be neighbours, so that phase 1 is one call for each context.
        moved = torch.cat([torch.arange(row.bounds[s], row.bounds[s + 1]) for s in order])
        input_ids = input_ids.index_select(0, on_device(moved, input_ids.device))
        back = on_device(torch.empty_like(moved).scatter_(0, moved, torch.arange(moved.numel())), input_ids.device)
    row, used = _grouped(row, order, [index[s] for s in order], prefixes)
    cache = prefix_cache([[prefix.layer(i) for prefix in used] for i in range(len(used[0].keys))]) if used else None
    call = PackedCall(row, None if cache is None else cache.prefixes)
    hidden = forward_on_row(body, input_ids, row.position_of_token, call, cache)
    return hidden if back is None else hidden.index_select(0, back)


def _grouped(
    row: PackedRow, order: list[int], index: list[int], prefixes: Mapping[int, SharedPrefix]
) -> tuple[PackedRow, list[SharedPrefix]]:
    """The row with its sequences in `order` and a group for those of equal `index`; and each group's prefix."""
    lengths = [row.lengths[s] for s in order]
    bounds = [0, *accumulate(lengths)]
    groups, used, first = [], [], 0
    for which, members in groupby(index):
        end = first + len(list(members))
        if len(prefixes[which]):  # an empty context is none
            groups.append(PrefixGroup(first, end, bounds[first], bounds[end], len(prefixes[which])))
            used.append(prefixes[which])
        first = end
    return row_of(lengths, row.cu_seqlens.device, groups), used


def pad_forward(
    body: nn.Module, prefixes: Mapping[int, SharedPrefix], input_ids: Tensor, row: PackedRow, index: Sequence[int]
) -> Tensor:
    """Packed ids (N,) after their prefixes -> (N, D), one right-padded batch with stock attention for each prefix.

    prefixes: by context, at least those that `index` (B,) names. RuntimeError if a layer did not read its prefix.
    """
    pieces: list[Tensor | None] = [None] * len(index)
    sequences = input_ids.split(list(row.lengths))
    for context in sorted(set(index)):
        members = [s for s, which in enumerate(index) if which == context and row.lengths[s]]
        if members:
            hidden = _padded_after(body, prefixes[context], [sequences[s] for s in members])
            for s, states in zip(members, hidden, strict=True):
                pieces[s] = states
    return torch.cat([states for states in pieces if states is not None])


def _padded_after(body: nn.Module, prefix: SharedPrefix, sequences: list[Tensor]) -> list[Tensor]:
    """Hidden states (T_i, D) of each of `sequences` (T_i,) after `prefix`."""
    # Without a padding mask: padding lies to the right of every token that is kept, where causal attention does not
    # look, and a mask with a row for each sequence would be the one tensor of size batch x context that stays.
    grid = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    if prefix.states and grid.shape[1] == 1:
        # One token alone takes another way through recurrent layers, made for sampling. Nemotron-H's does not bound the
        # time step from below and is off by 4e-3; so one more column, which nothing reads.
        grid = torch.nn.functional.pad(grid, (0, 1))
    # After no prefix the model counts by itself: given positions, it would look on the device for packed sequences.
    cache, positions = None, None
    if len(prefix):
        positions = torch.arange(len(prefix), len(prefix) + grid.shape[1], device=grid.device).expand_as(grid)
        stored = [prefix.layer(index) for index in range(len(prefix.keys))]
        cache = expanded_cache(stored, prefix.states, len(prefix), len(sequences))
    hidden = seam.run_body(body, grid, position_ids=positions, cache=cache)
    missed = unread_layers(cache) if cache is not None else []
    if missed:
        raise RuntimeError(f"layers {missed} did not read the context; use path='concat'")
    return [states[: len(ids)] for states, ids in zip(hidden, sequences, strict=True)]


def concat_forward(
    body: nn.Module,
    contexts: Sequence[Tensor],
    input_ids: Tensor,
    row: PackedRow,
    index: Sequence[int],
    *,
    alone: bool = False,
) -> Tensor:
    """Packed ids (N,) after their contexts -> (N, D), in one right-padded batch of context and sequence.

    One sequence at a time with `alone`, and where the longest of a batch would change the positions of all others.
    """
    if (alone or moving_rope(body)) and len(index) > 1:
        singles = [
            concat_forward(body, contexts, ids, row_of([len(ids)], ids.device), [which])
            for ids, which in zip(input_ids.split(list(row.lengths)), index, strict=True)
            if len(ids)
        ]
        return torch.cat(singles)
    placed = [on_device(contexts[i], input_ids.device) for i in index]
    pieces = [part for pair in zip(placed, input_ids.split(list(row.lengths)), strict=True) for part in pair]
    context_lengths = [c.numel() for c in placed]
    whole = row_of([c + t for c, t in zip(context_lengths, row.lengths, strict=True)], input_ids.device)
    suffix = (whole.offset_on_host >= torch.tensor(context_lengths)[whole.sequence_on_host]).nonzero().squeeze(1)
    return padded_forward(body, torch.cat(pieces), whole).index_select(0, on_device(suffix, input_ids.device))

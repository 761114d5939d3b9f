"""The student's body on a packed row: hidden states with gradients, no padding and no vocabulary."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from transformers import Cache

from opcd_fast.attention import PackedCall, PackedRow, PrefixGroup, TreeCall, on_device, packed_row, row_of
from opcd_fast.models import seam
from opcd_fast.models.architectures import refuses_packing, rope_switch
from opcd_fast.models.prefix_tuning import Prefix, refuses_prefix

logger = logging.getLogger("opcd_fast")


@cache
def say_once(key: str, message: str) -> None:
    """In the log, once per process for each architecture (`key`) and reason."""
    logger.warning(message)


def packed_hidden_states(
    model: nn.Module, input_ids: Tensor, cu_seqlens: Tensor, *, select: Tensor | None = None
) -> Tensor:
    """Last hidden states of sequences that lie back to back, each on its own from position 0.

    With a trained prefix (PEFT prefix tuning) every sequence continues that, from position p on.

    input_ids: (N,) integers; cu_seqlens: (B + 1,), rising from 0 to N; select: (M,) positions in the row, to
    return only those. Returns (N, D) or (M, D) in the model's dtype, differentiable. Adapters, dropout and
    gradient checkpointing act as `model` has them. The lm-head is not run; neither are the hooks of a
    data-parallel wrapper, whose gradients the caller reduces.

    Architectures that do not run exactly on a packed row go through one right-padded batch, said once in the log;
    through two, where sequences lie on both sides of the length at which longrope moves positions. Raises ValueError
    for malformed rows, for a sequence longer than the model's `max_position_embeddings`, for a trained prefix in front
    of such an architecture, and for virtual tokens of another kind.
    """
    body = seam.body_of(model)
    prefix = seam.trained_prefix(model)
    if input_ids.ndim != 1 or input_ids.is_floating_point():
        raise ValueError(f"input_ids: expected packed token ids of shape (N,), got {tuple(input_ids.shape)}")
    row = packed_row(cu_seqlens, input_ids.numel(), input_ids.device)
    check_fits(body, row.longest)
    reason = refuses_packing(body)
    if prefix is not None:
        hidden = _after_prefix(model, body, input_ids, row, prefix)
    elif reason is None:
        hidden = forward_on_row(body, input_ids, row.offset_of_token, PackedCall(row))
    else:
        say_once(type(body).__name__, f"student: padded batch with stock attention, because {reason}")
        hidden = _padded(body, input_ids, row)
    return hidden if select is None else hidden.index_select(0, on_device(select, hidden.device))


def check_fits(body: nn.Module, longest: int) -> None:
    """ValueError when a sequence of `longest` tokens is more than the model takes."""
    limit = seam.longest_input(body)
    if limit is not None and longest > limit:
        raise ValueError(
            f"input_ids: the longest sequence has {longest} tokens, {longest - limit} more than the "
            f"model's max_position_embeddings of {limit}"
        )


def _after_prefix(model: nn.Module, body: nn.Module, input_ids: Tensor, row: PackedRow, prefix: Prefix) -> Tensor:
    reason = refuses_prefix(model)
    if reason is not None:
        raise ValueError(f"model: its trained prefix cannot be run on a packed row, because {reason}; use LoRA")
    row = replace(row, groups=(PrefixGroup(0, len(row.lengths), 0, row.bounds[-1], prefix[0][0].shape[2]),))
    check_fits(body, row.reach)
    call = PackedCall(row, lambda layer, _: [prefix[layer.layer_idx]])  # type: ignore[call-overload]
    return forward_on_row(body, input_ids, row.position_of_token, call)


def forward_on_row(
    body: nn.Module, input_ids: Tensor, positions: Tensor, call: PackedCall | TreeCall, cache: Cache | None = None
) -> Tensor:
    """Ids (N,) at positions (N,) as one row -> (N, D), every layer's attention by `call`.

    RuntimeError when a layer's attention went another way.
    """
    attention = seam.using_attention(body, call.attend)
    # A checkpointed layer recomputes in the backward pass and needs the row again there.
    recomputing = seam.recomputing_under(body, attention) if torch.is_grad_enabled() else nullcontext()
    with attention(), recomputing:
        hidden = seam.run_body(body, input_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), cache=cache)
    missed = sorted(set(range(seam.num_layers(body))) - call.layers_done)
    if missed:
        raise RuntimeError(
            f"layers {missed} did not read the context, or saw other sequences: they did not run packed attention, "
            "which a teacher does without on path='concat'"
        )
    return hidden.squeeze(0)


def _padded(body: nn.Module, input_ids: Tensor, row: PackedRow) -> Tensor:
    """`padded_forward`, where no sequence decides on another one's positions."""
    switch = rope_switch(body)
    long = [switch is not None and length > switch for length in row.lengths]
    if len(set(long)) == 1:
        return padded_forward(body, input_ids, row)
    is_long = torch.tensor(long)[row.sequence_on_host]
    hidden: Tensor | None = None
    for side in (False, True):
        place = torch.nonzero(is_long == side).squeeze(1)
        if not place.numel():  # empty sequences alone
            continue
        place = on_device(place, input_ids.device)
        lengths = [n for n, which in zip(row.lengths, long, strict=True) if which == side]
        part = padded_forward(body, input_ids[place], row_of(lengths, input_ids.device))
        start = part.new_zeros(len(input_ids), part.shape[-1]) if hidden is None else hidden
        hidden = start.index_copy(0, place, part)
    assert hidden is not None, "no tokens"
    return hidden


def padded_forward(body: nn.Module, input_ids: Tensor, row: PackedRow) -> Tensor:
    """Packed ids (N,) -> (N, D) in one right-padded batch with the model's own attention; differentiable."""
    batch, longest = len(row.lengths), row.longest
    grid = input_ids.new_zeros(batch * longest)
    grid[row.slot_of_token] = input_ids
    mask = None
    if row.ragged:
        mask = torch.zeros(batch * longest, dtype=torch.int64, device=input_ids.device)
        mask[row.slot_of_token] = 1
        mask = mask.view(batch, longest)
        mask[:, 0] = 1  # a row of no tokens must have one key, or it turns into NaN and poisons gradients
    hidden = seam.run_body(body, grid.view(batch, longest), attention_mask=mask)
    return hidden.reshape(batch * longest, -1).index_select(0, row.slot_of_token)

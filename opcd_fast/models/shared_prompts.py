"""Several continuations of one beginning through a model that is trained: it is read once, forward and backward.

    ids         prompt A | answer A1 | answer A2 | prompt B | answer B1 | answer B2 | answer B3
    parent        -1          0           0          -1          3           3           3

With n answers of T tokens after a prompt of P, the body runs P + n T tokens instead of n (P + T), and hidden states
and gradients are those of n sequences that stand alone: the prompt's tokens do not see the answers, so that they are
the same in all of them. A beginning is a prompt with several answers, or what different prompts have in common: the
system prompt that a chat template puts in front of each (`opcd_fast.data.batch` chooses).
"""

from __future__ import annotations

import logging
from itertools import accumulate

import torch
from torch import Tensor, nn

from opcd_fast.attention import TreeCall, TreeRow, on_device, tree_row
from opcd_fast.errors import InputError
from opcd_fast.models import seam
from opcd_fast.models.architectures import refuses_sharing
from opcd_fast.models.packed import check_fits, forward_on_row, packed_hidden_states, say_once

logger = logging.getLogger("opcd_fast")


def shares_prompts(model: nn.Module, asked: bool | None, answers: int) -> bool:
    """Whether training reads what prompts have in common once; a prompt has `answers` answers.

    Raises InputError where that is asked for in vain.
    """
    if asked is False:
        return False
    reason = _refuses(model, training=True)
    if reason is not None and asked:
        raise InputError(f"share_prompts=True: {reason}; leave it out")
    if reason is not None and answers > 1:
        logger.warning("student: every answer has its own copy of the prompt, because %s", reason)
    return reason is None


def shared_prompt_hidden_states(
    model: nn.Module, input_ids: Tensor, cu_seqlens: Tensor, parent: Tensor, *, select: Tensor | None = None
) -> Tensor:
    """Last hidden states of segments that lie back to back, some of which continue another one.

    input_ids: (N,) integers. cu_seqlens: (S + 1,), rising from 0 to N. parent: (S,) integers; -1 for a segment that
    is a prompt or stands alone, else the index of its prompt, an earlier segment whose own parent is -1. A
    continuation sees all of its prompt and, causally, itself; its positions go on where the prompt ends. select: (M,)
    positions in the row, to return only those; they may repeat. The hidden state that predicts a continuation's first
    token is that of the prompt's last token, one row for all continuations: its gradient is the sum of theirs.

    Returns (N, D) or (M, D) in the model's dtype, differentiable once. Adapters and gradient checkpointing act as
    `model` has them. So does dropout, except that a prompt's tokens are dropped alike for all of its continuations.

    Where `architectures.refuses_sharing` has a reason, and with a trained prefix, sequences run unshared, said once in
    the log. Raises ValueError for malformed rows and for a prompt with continuation longer than the model's
    `max_position_embeddings`.
    """
    if input_ids.ndim != 1 or input_ids.is_floating_point():
        raise ValueError(f"input_ids: expected packed token ids of shape (N,), got {tuple(input_ids.shape)}")
    body = seam.body_of(model)
    row = tree_row(cu_seqlens, parent, input_ids.numel(), input_ids.device)
    check_fits(body, row.longest)
    reason = _refuses(model, training=body.training)
    if reason is not None:
        say_once(f"shared prompts {type(body).__name__}", f"student: prompts are not shared, because {reason}")
        index, bounds, place = unshared(row)
        place = place if select is None else place.index_select(0, on_device(select, place.device))
        return packed_hidden_states(model, input_ids.index_select(0, index), bounds, select=place)
    hidden = forward_on_row(body, input_ids.index_select(0, row.order), row.positions, TreeCall(row))
    places = row.back if select is None else row.back.index_select(0, on_device(select, row.back.device))
    return hidden.index_select(0, places)


def _refuses(model: nn.Module, training: bool) -> str | None:
    if seam.prompt_learner(model) is not None:
        return "its adapter is a trained prefix"
    return refuses_sharing(seam.body_of(model), training=training)


def unshared(row: TreeRow) -> tuple[Tensor, Tensor, Tensor]:
    """The same sequences with a copy of the prompt in each.

    Returns (M,) the caller's token that each place of the expanded row holds, (B + 1,) int32 bounds of its sequences,
    and (N,) where each of the caller's tokens is in it; a prompt's are in one of its copies.
    """
    prompts = len(row.children.groups)
    starts = [0, *accumulate((*row.roots.lengths, *row.children.lengths))]
    segments = [torch.arange(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    roots, children = segments[: len(row.roots.lengths)], segments[len(row.roots.lengths) :]
    sequences = [
        torch.cat([roots[which], children[child]])
        for which, group in enumerate(row.children.groups)
        for child in range(group.first_sequence, group.end_sequence)
    ] + roots[prompts:]
    copies = torch.cat(sequences)  # in the order of the tree row
    bounds = torch.tensor([0, *accumulate(map(len, sequences))], dtype=torch.int32)
    place = torch.zeros(starts[-1], dtype=torch.int64)
    place.scatter_reduce_(0, copies, torch.arange(len(copies)), "amin", include_self=False)
    device = row.order.device
    return row.order[on_device(copies, device)], bounds, on_device(place, device)[row.back]

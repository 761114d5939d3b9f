"""A call of the teacher in parts, so that what it holds at once stays below a bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from opcd_fast.attention import PackedRow, on_device, packed_row
from opcd_fast.teacher.budget import Part, part_bytes, sizes_of

Run = Callable[[Tensor, PackedRow, Sequence[int]], Tensor]
"""Packed ids (n,), their row and the context of each of its sequences -> hidden states (n, D)."""


def split(
    body: nn.Module,
    path: str,
    lengths: Sequence[int],
    index: Sequence[int],
    context_lengths: Sequence[int],
    max_bytes: int,
    fetched: bool = False,
) -> tuple[list[list[int]], int]:
    """Sequences that have tokens in parts, each of which needs at most `max_bytes`; and the bytes of the largest part.

    lengths, index, context_lengths: tokens, context and tokens of the context of each sequence. One that needs more by
    itself is a part of its own. Sequences of one context stay together and long ones come first, so that few contexts
    are read for each part and little is padded.
    """
    sizes = sizes_of(body)

    def order(sequence: int) -> tuple[int, ...]:
        if path == "concat":  # its padding does not care which context it is
            return (-context_lengths[sequence] - lengths[sequence], sequence)
        return (index[sequence], -lengths[sequence], sequence)

    parts: list[list[int]] = []
    part, most = Part(), 0
    for sequence in sorted((s for s, length in enumerate(lengths) if length), key=order):
        one = (lengths[sequence], index[sequence], context_lengths[sequence])
        longer = part.plus(*one, sizes.window)
        fits = part_bytes(sizes, path, longer, fetched) <= max_bytes
        if path == "pad" and len(longer.contexts) > 1:
            fits = False  # it runs context by context anyway
        if not parts or not fits:
            parts.append([])
            longer = Part().plus(*one, sizes.window)
        parts[-1].append(sequence)
        part = longer
        most = max(most, part_bytes(sizes, path, part, fetched))
    return parts, most


def run_in_parts(
    run: Run,
    input_ids: Tensor,
    row: PackedRow,
    index: Sequence[int],
    parts: Sequence[Sequence[int]],
    select: Tensor | None,
) -> Tensor:
    """`run` for each of `parts`: hidden states (N, D) in the order of `row`, or (M, D) of the positions `select`.

    Parts hold every sequence that has tokens once. Of each part only the selected positions are kept.
    """
    bounds = row.bounds
    wanted = None if select is None else select.cpu()
    out: Tensor | None = None
    for sequences in parts:
        tokens = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in sequences])
        ends = torch.tensor([0] + [row.lengths[s] for s in sequences]).cumsum(0)
        part_row = packed_row(ends, tokens.numel(), input_ids.device)
        hidden = run(input_ids[on_device(tokens, input_ids.device)], part_row, [index[s] for s in sequences])
        if wanted is None:
            target = tokens
        else:
            place = torch.full((input_ids.numel(),), -1)
            place[tokens] = torch.arange(tokens.numel())
            target = torch.nonzero(place[wanted] >= 0).squeeze(1)  # rows of the result that lie in this part
            hidden = hidden.index_select(0, on_device(place[wanted[target]], hidden.device))
        if out is None:
            out = hidden.new_empty(input_ids.numel() if wanted is None else wanted.numel(), hidden.shape[-1])
        out.index_copy_(0, on_device(target, hidden.device), hidden)
        del hidden  # or the next part would run beside it
    assert out is not None, "no parts"
    return out

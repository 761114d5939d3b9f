"""The ways to run packed sequences after their contexts, and the check of one against the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opcd_fast import transformers_seam as seam
from opcd_fast.attention import PackedCall, PackedRow, PrefixGroup, attention_on_row, packed_row, running
from opcd_fast.prefix import SharedPrefix, cache_of
from opcd_fast.student import padded_forward

_TOLERANCE_FP32 = 1e-4  # max |difference| of hidden states of order 1
_TOLERANCE_HALF = 0.05  # relative RMS; a missing or wrong key gives differences of order 1


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
        bounds = row.cu_seqlens.tolist()
        moved = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in order]).to(input_ids.device)
        input_ids = input_ids.index_select(0, moved)
        back = torch.empty_like(moved).scatter_(0, moved, torch.arange(moved.numel(), device=moved.device))
    row, used = _grouped(row, order, [index[s] for s in order], prefixes)
    cache, counts = cache_of(used, seam.num_layers(body))
    starts = torch.tensor(row.prefix_lengths, device=input_ids.device)
    positions = row.offset_of_token + starts[row.sequence_of_token]
    call = PackedCall(row, counts)
    with running(call), seam.using_attention(body, attention_on_row):
        hidden = seam.run_body(body, input_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), cache=cache)[0]
    missed = sorted(set(range(seam.num_layers(body))) - call.layers_done)
    if missed:
        raise RuntimeError(f"attention layers {missed} did not read the context; use path='concat'")
    return hidden if back is None else hidden.index_select(0, back)


def _grouped(
    row: PackedRow, order: list[int], index: list[int], prefixes: Mapping[int, SharedPrefix]
) -> tuple[PackedRow, list[SharedPrefix]]:
    """The row with its sequences in `order` and its groups of equal `index`; and each group's prefix."""
    lengths = tuple(row.lengths[s] for s in order)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    groups, used = [], []
    first = 0
    for end in range(1, len(index) + 1):
        if end == len(index) or index[end] != index[first]:
            prefix = prefixes[index[first]]
            groups.append(PrefixGroup(first, end, bounds[first], bounds[end], len(prefix)))
            used.append(prefix)
            first = end
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=row.cu_seqlens.device)
    return PackedRow(lengths, cu_seqlens, tuple(groups)), used


def concat_forward(
    body: nn.Module, contexts: Sequence[Tensor], input_ids: Tensor, row: PackedRow, index: Sequence[int]
) -> Tensor:
    """Packed ids (N,) after their contexts -> (N, D), in one right-padded batch of context and sequence."""
    placed = [contexts[i].to(input_ids.device) for i in index]
    pieces = [part for pair in zip(placed, input_ids.split(list(row.lengths)), strict=True) for part in pair]
    ends = torch.tensor([0] + [c.numel() + t for c, t in zip(placed, row.lengths, strict=True)]).cumsum(0)
    ids = torch.cat(pieces)
    whole = packed_row(ends, ids.numel(), input_ids.device)
    context_lengths = torch.tensor([c.numel() for c in placed], device=input_ids.device)
    is_suffix = whole.offset_of_token >= context_lengths[whole.sequence_of_token]
    return padded_forward(body, ids, whole)[is_suffix]


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: either would turn rounding into a mismatch."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def verify(body: nn.Module) -> tuple[str, bool]:
    """Run merge and concat on tiny random models of `body`'s kind; (what was measured, whether they agree).

    In fp32, and once more in the model's own dtype when that is shorter, because other kernels run there.
    """
    contexts = [torch.arange(9) * 7 % 64, torch.arange(5) * 11 % 64, torch.arange(0)]
    lengths, index = [1, 4, 7, 2], [1, 0, 0, 2]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    worst, worst_half, passed = 0.0, 0.0, True
    dtype, device = next(body.parameters()).dtype, next(body.parameters()).device
    ids = (torch.arange(sum(lengths)) * 5 % 64).to(device)
    row = packed_row(bounds, ids.numel(), device)
    for window in (5, 4096) if seam.has_sliding_window(body) else (None,):
        twin = seam.tiny_twin(body, window=window)
        for kind in dict.fromkeys((torch.float32, dtype)):
            twin = twin.to(kind)
            with _full_precision(device):
                # In chunks, as long contexts are read, so that the check covers that too.
                prefixes = {i: SharedPrefix.build(twin, c, chunk_tokens=4) for i, c in enumerate(contexts)}
                merged = merge_forward(twin, prefixes, ids, row, index).double()
                oracle = concat_forward(twin, contexts, ids, row, index).double()
            if kind == torch.float32:
                error = float((merged - oracle).abs().max())
                worst, passed = max(worst, error), passed and error <= _TOLERANCE_FP32
            else:
                error = float((merged - oracle).norm() / oracle.norm())
                worst_half, passed = max(worst_half, error), passed and error <= _TOLERANCE_HALF
    text = f"max difference {worst:.1e} in fp32"
    return text + (f", relative {worst_half:.1e} in {dtype}" if dtype != torch.float32 else ""), passed

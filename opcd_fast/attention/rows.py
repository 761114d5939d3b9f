"""Sequences back to back in one row, without padding: where they begin and end, and which prefix each continues.

N tokens in the row, B sequences, T the longest of them, H heads, d head size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

KeysAndValues = tuple[Tensor, Tensor]
"""(1, H_kv, n, d_k) and (1, H_kv, n, d_v) of n tokens in one layer."""


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; from the host to a CUDA device without the host waiting for what is queued there."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class PrefixGroup:
    """A run of sequences in the row that continue the same prefix of `length` >= 1 tokens."""

    first_sequence: int
    end_sequence: int
    first_token: int
    end_token: int
    length: int


@dataclass(frozen=True, eq=False)
class PackedRow:
    """Where the sequences of a row begin and end. Lengths are known on the host, so that nothing asks the device."""

    lengths: tuple[int, ...]  # tokens of each sequence
    cu_seqlens: Tensor  # (B + 1,) int32, on the row's device
    groups: tuple[PrefixGroup, ...] = ()  # empty: no sequence has a prefix
    kept: dict[Any, Any] = field(default_factory=dict, init=False)  # what layers work out from it alone, once for all

    @functools.cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @functools.cached_property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    @functools.cached_property
    def bounds(self) -> tuple[int, ...]:
        """`cu_seqlens` on the host."""
        return (0, *accumulate(self.lengths))

    @functools.cached_property
    def sequence_on_host(self) -> Tensor:
        """(N,) int64, sequence of each token, on the CPU."""
        counts = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.lengths)), counts, output_size=sum(self.lengths))

    @functools.cached_property
    def offset_on_host(self) -> Tensor:
        """(N,) int64, position of each token inside its own sequence, on the CPU."""
        return torch.arange(sum(self.lengths)) - torch.tensor(self.bounds, dtype=torch.int64)[self.sequence_on_host]

    @functools.cached_property
    def offset_of_token(self) -> Tensor:
        """(N,) int64, position inside its own sequence."""
        return on_device(self.offset_on_host, self.cu_seqlens.device)

    @functools.cached_property
    def slot_of_token(self) -> Tensor:
        """(N,) int64, position in a flattened right-padded (B, T) grid."""
        return on_device(self.sequence_on_host * self.longest + self.offset_on_host, self.cu_seqlens.device)

    @functools.cached_property
    def position_of_token(self) -> Tensor:
        """(N,) int64, position counted from the start of its prefix."""
        before = torch.tensor(self.prefix_lengths, dtype=torch.int64)[self.sequence_on_host]
        return on_device(self.offset_on_host + before, self.cu_seqlens.device)

    @functools.cached_property
    def group_of_sequence(self) -> list[int | None]:
        """Index of each sequence's group; None for one without a prefix."""
        found: list[int | None] = [None] * len(self.lengths)
        for index, group in enumerate(self.groups):
            for sequence in range(group.first_sequence, group.end_sequence):
                found[sequence] = index
        return found

    @functools.cached_property
    def prefix_lengths(self) -> list[int]:
        """Context tokens in front of each sequence."""
        return [0 if group is None else self.groups[group].length for group in self.group_of_sequence]

    @functools.cached_property
    def reach(self) -> int:
        """Tokens of the longest sequence, its prefix included."""
        return max((p + t for p, t in zip(self.prefix_lengths, self.lengths, strict=True)), default=0)


def row_of(lengths: Iterable[int], device: torch.device, groups: Iterable[PrefixGroup] = ()) -> PackedRow:
    """The row of sequences of `lengths` tokens."""
    lengths = tuple(lengths)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackedRow(lengths, on_device(cu_seqlens, device), tuple(groups))


def packed_row(cu_seqlens: Tensor, tokens: int, device: torch.device) -> PackedRow:
    """The row of `tokens` tokens that `cu_seqlens` (B + 1,) of any integer type divides.

    cu_seqlens is read on the host: give it there, as fetching it waits for the device. Sequences may be empty, the row
    may not. Raises ValueError when cu_seqlens does not rise from 0 to `tokens`.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens: expected integers of shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if tokens == 0:
        raise ValueError("input_ids: no tokens at all")
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens: must rise from 0 to the {tokens} tokens of input_ids, got {bounds[:4]}…{bounds[-1]}"
        )
    return row_of(lengths, device)


def to_grid(x: Tensor, row: PackedRow) -> Tensor:
    """(1, H, N, d) -> (B, H, T, d), zeros after the end of a sequence."""
    tokens = x[0].transpose(0, 1)  # (N, H, d)
    shape = (len(row.lengths), row.longest, *tokens.shape[1:])
    if row.ragged:
        grid = tokens.new_zeros(shape[0] * shape[1], *tokens.shape[1:])
        tokens = grid.index_copy(0, row.slot_of_token, tokens)
    return tokens.reshape(shape).transpose(1, 2)


def from_grid(x: Tensor, row: PackedRow) -> Tensor:
    """(B, H, T, d) -> (N, H, d)."""
    flat = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
    return flat.index_select(0, row.slot_of_token) if row.ragged else flat


def tokens_first(x: Tensor) -> Tensor:
    """(1, H, n, ...) -> (n, H, ...)."""
    return x[0].transpose(0, 1)


def heads_first(x: Tensor) -> Tensor:
    """(n, H, ...) -> (1, H, n, ...)."""
    return x.transpose(0, 1).unsqueeze(0)

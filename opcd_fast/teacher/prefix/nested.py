"""Which contexts begin alike: a system prompt they share, and notes that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TOKENS = 64
"""A common beginning counts when it is longer, by this, than the one around it: it costs one more forward pass."""


@dataclass(frozen=True)
class Beginning:
    """The first `length` tokens of every context in `members`; they are the same."""

    length: int
    members: frozenset[int]

    @property
    def place(self) -> tuple[int, int]:
        """(first member, length): names these tokens."""
        return min(self.members), self.length


def shared_beginnings(contexts: Sequence[Tensor], least: int | None = None) -> list[list[Beginning]]:
    """For each context its shared beginnings, each at least `least` (LEAST_TOKENS) tokens longer than the last.

    contexts: (P_i,) int64 token ids >= 0. A beginning may be a whole context. Contexts with the same tokens share a
    beginning of all of them.
    """
    least = LEAST_TOKENS if least is None else least
    found: list[list[Beginning]] = [[] for _ in contexts]
    # Bytes of fixed width compare token by token, so that neighbours in the order share the most.
    order = sorted(range(len(contexts)), key=lambda i: contexts[i].numpy().tobytes())
    common = [_common(contexts[a], contexts[b]) for a, b in zip(order, order[1:])]  # noqa: B905 (one shorter)
    ranges = [(0, len(order), 0)]  # of `order`, with the length of the beginning around it
    while ranges:
        first, end, outer = ranges.pop()
        inside = common[first : end - 1]
        if not inside:
            continue
        length = min(inside)
        if length >= outer + least:
            members = frozenset(order[first:end])
            for index in members:
                found[index].append(Beginning(length, members))
            outer = length
        start = first
        for place in range(first, end):
            # Neighbours that share too little beyond the beginning around them belong to different groups.
            if place + 1 == end or common[place] < outer + least:
                if place + 1 - start > 1:
                    ranges.append((start, place + 1, outer))
                start = place + 1
    return found


def _common(a: Tensor, b: Tensor) -> int:
    """Tokens at the beginning that are the same."""
    shorter = min(a.numel(), b.numel())
    differ = torch.nonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if differ.numel() else shorter

"""The longest common beginning of token sequences."""

from __future__ import annotations

from collections.abc import Sequence


def common_prefix_length(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows share at their beginning, always leaving every row at least one token of its own.

    The smallest and the largest row in dictionary order share what all rows share.
    """
    ordered = [tuple(row) for row in rows]
    low, high = min(ordered), max(ordered)
    limit = min(map(len, ordered)) - 1
    return next((place for place in range(limit) if low[place] != high[place]), max(limit, 0))

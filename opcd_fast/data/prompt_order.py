"""Which prompts a step draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from opcd_fast.runtime import stream_seed

Row = TypeVar("Row")


def prompts_of_step(rows: Sequence[Row], step: int, batch_size: int, repeats: int, seed: int) -> list[Row]:
    """`batch_size` rows, each `repeats` times in a row.

    Every epoch is a fresh permutation, and any step can be computed on its own. step: from 0.
    """
    drawn: list[Row] = []
    orders: dict[int, list[int]] = {}
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(index, len(rows))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(stream_seed(seed, "order", epoch))
            orders[epoch] = torch.randperm(len(rows), generator=generator).tolist()
        drawn += [rows[orders[epoch][place]]] * repeats
    return drawn

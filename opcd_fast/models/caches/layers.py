"""What transformers asks of one layer of a cache. Part of the seam to transformers; checked on 5.17, 5.23 and 5.24."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from opcd_fast.attention import KeysAndValues


def on(device: torch.device, pair: KeysAndValues) -> KeysAndValues:
    """Keys and values there; what lies there is handed out as it is."""
    # Without a wait of the host: the stream that makes the copy is the one that reads it afterwards.
    keys, values = (x.to(device, non_blocking=device.type == "cuda") for x in pair)
    return keys, values


class CacheLayer(CacheLayerMixin):
    """A layer that has seen `length` tokens and holds the keys of the last `kept` of them, or of all.

    Subclasses say what `update` does.
    """

    is_sliding = False

    def __init__(self, length: int = 0, kept: int | None = None) -> None:
        super().__init__()
        self.length, self.kept = length, kept
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        pass

    def get_seq_length(self, *args: Any) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the mask covers, and the position of the first of them."""
        kept = self.length if self.kept is None else self.kept
        return kept + query_length, self.length - kept

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before 5.18

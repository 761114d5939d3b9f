"""A transformers cache that writes in place and drops rows: what a decoding loop over a batch needs.

Part of the seam to transformers; checked on 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class BufferedLayer(CacheLayerMixin):
    """One layer's keys and values in a buffer that `update` writes in place, (rows, H_kv, capacity, d) each."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.end, self.capacity = 1, 0, 0
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        pass

    def spread(self, rows: Tensor, capacity: int) -> None:
        """Row i becomes a copy of what row `rows[i]` held; room for `capacity` tokens. An empty cache has one row."""
        self.rows, self.capacity = len(rows), capacity
        if self.end:
            self.keys, self.values = self._moved(self.keys, rows), self._moved(self.values, rows)

    def _moved(self, held: Any, rows: Tensor) -> Tensor:
        new = held.new_empty(len(rows), held.shape[1], self.capacity, held.shape[3])
        new[:, :, : self.end] = held[rows, :, : self.end]
        return new

    def keep(self, rows: Tensor) -> None:
        """Only these rows stay, in rising order; the buffer is the same."""
        count = len(rows)
        held: Any
        for held in (self.keys, self.values):
            held[:count, :, : self.end] = held[rows, :, : self.end]
        self.keys, self.values, self.rows = self._first(self.keys, count), self._first(self.values, count), count

    @staticmethod
    def _first(held: Any, count: int) -> Tensor:
        return held[:count]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.end = self.end, self.end + key_states.shape[-2]
        keys: Any = self.keys
        values: Any = self.values
        if start == 0:
            shape = (self.rows, key_states.shape[1], self.capacity)
            self.keys = keys = key_states.new_empty(*shape, key_states.shape[3])
            self.values = values = value_states.new_empty(*shape, value_states.shape[3])
        elif keys.dtype != key_states.dtype:  # a trained prefix comes in the weights' type, whatever the model runs in
            self.keys, self.values = keys, values = keys.to(key_states.dtype), values.to(value_states.dtype)
        keys[:, :, start : self.end] = key_states
        values[:, :, start : self.end] = value_states
        return keys[:, :, : self.end], values[:, :, : self.end]

    def get_seq_length(self, *args: Any) -> int:
        return self.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before 5.18


class BufferedCache(Cache):
    """A `BufferedLayer` for every layer; the two methods act on all."""

    def spread(self, rows: Tensor, capacity: int) -> None:
        layer: Any
        for layer in self.layers:
            layer.spread(rows, capacity)

    def keep(self, rows: Tensor) -> None:
        layer: Any
        for layer in self.layers:
            layer.keep(rows)


def buffered_cache(layers: int) -> BufferedCache:
    """An empty cache of `layers` layers."""
    return BufferedCache(layers=[BufferedLayer() for _ in range(layers)])

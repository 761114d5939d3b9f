"""A transformers cache that writes in place and drops rows: what a decoding loop over a batch needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from opcd_fast.models.caches.layers import CacheLayer


class BufferedLayer(CacheLayer):
    """One layer's keys and values in a buffer that `update` writes in place, (rows, H_kv, capacity, d) each."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.capacity = 1, 0

    def spread(self, rows: Tensor, capacity: int) -> None:
        """Row i becomes a copy of what row `rows[i]` held; room for `capacity` tokens. An empty cache has one row."""
        self.rows, self.capacity = len(rows), capacity
        if self.length:
            self.keys, self.values = self._moved(self.keys, rows), self._moved(self.values, rows)

    def _moved(self, held: Any, rows: Tensor) -> Tensor:
        new = held.new_empty(len(rows), held.shape[1], self.capacity, held.shape[3])
        new[:, :, : self.length] = held[rows, :, : self.length]
        return new

    def keep(self, rows: Tensor) -> None:
        """Only these rows stay, in rising order; the buffer is the same."""
        count = len(rows)
        held: Any
        for held in (self.keys, self.values):
            held[:count, :, : self.length] = held[rows, :, : self.length]
        keys: Any = self.keys
        values: Any = self.values
        self.keys, self.values, self.rows = keys[:count], values[:count], count

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[-2]
        keys: Any = self.keys
        values: Any = self.values
        if start == 0:
            shape = (self.rows, key_states.shape[1], self.capacity)
            self.keys = keys = key_states.new_empty(*shape, key_states.shape[3])
            self.values = values = value_states.new_empty(*shape, value_states.shape[3])
        elif keys.dtype != key_states.dtype:  # a trained prefix comes in the weights' type, whatever the model runs in
            self.keys, self.values = keys, values = keys.to(key_states.dtype), values.to(value_states.dtype)
        keys[:, :, start : self.length] = key_states
        values[:, :, start : self.length] = value_states
        return keys[:, :, : self.length], values[:, :, : self.length]


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

"""The cache of a decoding loop: what all rows share lies there once, each row's own keys in a buffer beside it.

It is filled by packed passes (first what is shared, then every prompt's rest) and grows by one token for each row. As
in `models.caches.prefix` the model gets its own keys back, and attention asks for those of the prefix by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd_fast.attention import KeysAndValues
from opcd_fast.models.caches.prefix import PrefixCache, PrefixLayer


@dataclass(eq=False)
class Slots:
    """Where the next tokens go, the same for all layers. The newest tokens of all rows lie in the same slot.

    A pass reads packed tokens (`reads`), or one token for each of `rows` rows into slot `end`, and attends the slots up
    to there. With `at`, the number of that slot on the device, `shown` slots are attended instead, so that nothing in
    the pass depends on the host. capacity: slots of a buffer.
    """

    rows: int = 1
    capacity: int = 0
    reads: bool = False
    end: int = 0
    at: Tensor | None = None  # (1,) int64
    shown: int = 0
    places: dict[Any, Tensor] | None = None
    keeps_read: bool = False

    def stay(self, name: Any, x: Tensor) -> Tensor:
        """`x`, in its place."""
        if self.places is None or self.places.get(name) is x:
            return x
        if name not in self.places:
            return self.places.setdefault(name, x.clone())
        return self.places[name].copy_(x)

    def kept(self, x: Tensor, rows: Tensor) -> Tensor:
        """These rows of `x`, in rising order; where tensors stay, at the beginning of its place."""
        if self.places is None:
            return x[rows]
        x[: len(rows)] = x[rows]
        return x[: len(rows)]


class BufferedLayer(PrefixLayer):
    """prefix: (1, H_kv, P, d) keys and values, or None; keys, values: (rows, H_kv, capacity, d), or what was read."""

    def __init__(self, slots: Slots, index: int) -> None:
        super().__init__()
        self.slots, self.index = slots, index
        self.prefix: KeysAndValues | None = None
        self.keys = self.values = None

    def prefixes(self, device: torch.device) -> Sequence[KeysAndValues]:
        return [] if self.prefix is None else [self.prefix]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        slots, new = self.slots, (key_states.to(value_states.dtype), value_states)
        if slots.reads:
            self.keys, self.values = new = self._settled(*new) if slots.keeps_read else new
            return super().update(*new)
        if self.keys is None or self.values is None:
            self.keys, self.values = (self._buffer(*x) for x in enumerate(new))
        for held, x in zip((self.keys, self.values), new, strict=True):
            if slots.at is None:
                held[:, :, slots.end] = x[:, :, 0]
            else:
                held.index_copy_(2, slots.at, x)
        shown = slots.end + 1 if slots.at is None else slots.shown
        return super().update(self.keys[:, :, :shown], self.values[:, :, :shown])

    def _buffer(self, which: int, like: Tensor) -> Tensor:
        # Zeros where slots are attended before they are written: their weight is 0, and 0 times NaN is NaN.
        make = like.new_empty if self.slots.at is None else like.new_zeros
        made = make(self.slots.rows, like.shape[1], self.slots.capacity, like.shape[3])
        return self.slots.stay((self.index, which), made)

    def _settled(self, *prefix: Tensor) -> KeysAndValues:
        return self.slots.stay((self.index, 2), prefix[0]), self.slots.stay((self.index, 3), prefix[1])

    def take_prefix(self) -> None:
        """What was read goes to the end of the prefix."""
        if self.keys is not None and self.values is not None:  # some layers read another one's
            new: list[Tensor] = [self.keys, self.values]
            if self.prefix is not None:  # a trained one has the weights' type, whatever the model runs in
                new = [torch.cat([old.to(x), x], 2) for old, x in zip(self.prefix, new, strict=True)]
            self.prefix, self.keys, self.values = (new[0], new[1]), None, None

    def spread(self, source: Tensor) -> None:
        """Of the tokens read, (rows, n) go into each row's first n slots."""
        if self.keys is not None and self.values is not None:
            read = self.keys, self.values
            self.keys, self.values = (self._buffer(*x) for x in enumerate(read))
            for held, x in zip((self.keys, self.values), read, strict=True):
                held[:, :, : source.shape[1]] = x[0][:, source].transpose(0, 1)
            if self.prefix is not None:
                self.prefix = self._settled(self.prefix[0].to(self.keys), self.prefix[1].to(self.values))

    def keep(self, rows: Tensor) -> None:
        """Only these rows stay, in rising order; the buffer is the same."""
        if self.keys is not None and self.values is not None:
            for held in (self.keys, self.values):
                held[: len(rows), :, : self.slots.end] = held[rows, :, : self.slots.end]
            self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]


class BufferedCache(PrefixCache):
    """A `BufferedLayer` for every layer."""

    layers: list[BufferedLayer]  # type: ignore[assignment]

    def __init__(self, layers: int) -> None:
        self.slots = Slots()
        super().__init__(layers=[BufferedLayer(self.slots, index) for index in range(layers)])

    @property
    def nbytes(self) -> int:
        tensors = (x for layer in self.layers for x in (layer.keys, layer.values, *(layer.prefix or ())))
        return sum(x.nbytes for x in tensors if x is not None)

    def set_prefix(self, layers: Sequence[KeysAndValues]) -> None:
        for layer, prefix in zip(self.layers, layers, strict=True):
            layer.prefix = prefix

    def take_prefix(self) -> None:
        for layer in self.layers:
            layer.take_prefix()

    def spread(self, source: Tensor, *, copies_prefix: bool) -> None:
        """See BufferedLayer. copies_prefix: what was read is put behind the prefix before, and no prefix is left."""
        for layer in self.layers:
            if copies_prefix:
                layer.take_prefix()
                if layer.prefix is not None:
                    (layer.keys, layer.values), layer.prefix = layer.prefix, None
            layer.spread(source)

    def keep(self, rows: Tensor) -> None:
        self.slots.rows = len(rows)
        for layer in self.layers:
            layer.keep(rows)

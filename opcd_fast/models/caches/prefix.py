"""Prefixes in front of a packed row: a cache for the model, which counts positions by it, and the call's prefixes.

The model hands each layer's keys to the cache and gets them back as they are: the prefix's own are never put in front
of them. Attention asks for those by layer. Some layers read another layer's keys (Gemma-3n, Gemma-4), and then its
prefix too. Which layer that is shows in the keys: they are the very tensor that the cache gave back there. Only
DeepSeek-V3 makes new ones: what it hands to the cache is compressed, and attention gets what the layer expands it to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from opcd_fast.attention import KeysAndValues
from opcd_fast.models.caches.layers import CacheLayer, on


class PrefixLayer(CacheLayer):
    """One layer: the model gets its own keys and values back, attention gets those of the prefixes."""

    def __init__(self, length: int = 0) -> None:
        super().__init__(length)
        self.given: Callable[[], Tensor | None] = lambda: None  # the keys it was given last, while they are in use

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.given = weakref.ref(key_states)  # weak: keys must not outlive their layer
        return key_states, value_states

    def prefixes(self, device: torch.device) -> Sequence[KeysAndValues]:
        """Of each of the row's groups, on `device`."""
        raise NotImplementedError


class FrozenLayer(PrefixLayer):
    """One of prefixes that do not change. RoPE is applied before a cache sees keys, so they are final."""

    def __init__(self, held: Sequence[KeysAndValues]) -> None:
        super().__init__(sum(keys.shape[-2] for keys, _ in held))
        self.held = held

    def prefixes(self, device: torch.device) -> Sequence[KeysAndValues]:
        return [on(device, pair) for pair in self.held]


class GrowingLayer(PrefixLayer):
    """Of a context of `tokens` tokens that arrives in chunks: the prefix of each chunk is what came before it.

    window: tokens a query sees, itself included, or None. Without one there is one buffer of the final size; with one,
    only the last window - 1 tokens are kept. Keys have the values' type, in which attention reads them. start: keys and
    values after the first `start_length` tokens. place: the device that keeps them, None for the layer's own.
    """

    def __init__(
        self,
        tokens: int,
        window: int | None,
        start: KeysAndValues | None = None,
        start_length: int = 0,
        place: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.window, self.place = tokens, window, place
        self.keys = self.values = None
        self._before: Sequence[KeysAndValues] = ()
        if start is not None:
            self._store(*start)
            self.length = start_length  # a window kept fewer keys than there were tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            kept, _ = self.get_mask_sizes(0)
            self._before = [(self.keys[..., :kept, :], self.values[..., :kept, :])]
        self._store(key_states, value_states)
        return super().update(key_states, value_states)

    def _store(self, key: Tensor, value: Tensor) -> None:
        self.keys, self.values = (
            self._grown(held, new, value.dtype) for held, new in ((self.keys, key), (self.values, value))
        )
        self.length += key.shape[-2]
        self.kept = None if self.window is None else self.keys.shape[-2]

    def _grown(self, held: Tensor | None, new: Tensor, dtype: torch.dtype) -> Tensor:
        if self.window is None:
            if held is None:
                held = new.new_empty(*new.shape[:-2], self.tokens, new.shape[-1], dtype=dtype, device=self.place)
            held[..., self.length : self.length + new.shape[-2], :] = new
            return held
        whole = new if held is None else torch.cat([held.to(new), new], dim=-2)
        first = max(0, whole.shape[-2] - self.window + 1)
        # A copy: a slice would keep the storage of the whole chunk alive.
        return whole[..., first:, :].to(self.place or new.device, dtype, copy=True)

    def prefixes(self, device: torch.device) -> Sequence[KeysAndValues]:
        return [on(device, pair) for pair in self._before]


class PrefixCache(Cache):
    """A `PrefixLayer` for each layer."""

    def prefixes(self, module: nn.Module, key: Tensor) -> Sequence[KeysAndValues]:
        """Keys and values of every prefix, for the attention layer `module` with the row's keys `key`, on their device.

        Raises RuntimeError for keys that did not pass through this cache.
        """
        index: int = module.layer_idx  # type: ignore[assignment]
        layers: Any = self.layers
        own = layers[index : index + 1]
        source = next((layer for layer in (*own, *layers) if layer.given() is key), None)
        if source is not None:
            return source.prefixes(key.device)
        if hasattr(module, "expand_kv") and own and own[0].given() is not None:
            return [module.expand_kv(*latent) for latent in own[0].prefixes(key.device)]  # type: ignore[operator]
        raise RuntimeError(
            f"attention layer {index} did not get its context: its keys did not pass through the cache, which was "
            "dropped on the way"
        )


def prefix_cache(layers: Sequence[Sequence[KeysAndValues]]) -> PrefixCache:
    """Of prefixes as layers[layer][prefix], in the order of the row's groups."""
    return PrefixCache(layers=[FrozenLayer(held) for held in layers])

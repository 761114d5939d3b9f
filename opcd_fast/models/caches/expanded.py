"""A prefix as a transformers cache for a padded batch: keys expanded one layer at a time, states copied per row.

Part of the seam to transformers; checked on 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from opcd_fast.attention import KeysAndValues
from opcd_fast.models.caches.layers import CacheLayer, on

# What stands in a cache for a layer that holds nothing: one that reads another's keys, or is no attention at all.
_EmptyLayer: Any = getattr(cache_utils, "DummyLayer", LinearAttentionLayer)  # the second on 5.17
_KEYS_ALONE = (DynamicLayer, DynamicSlidingWindowLayer, _EmptyLayer)
_RECURRENT = (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)


class ExpandedLayer(CacheLayer):
    """One layer's prefix for a padded batch, read-only: `update` puts it in front of every row's new keys.

    held: keys and values (1, H_kv, kept, d) of a prefix of `length` tokens, whose last `kept` they are. The copy for
    each row of the batch is made in `update` and lives as long as the layer's attention uses it.
    """

    def __init__(self, held: KeysAndValues, length: int) -> None:
        kept = held[0].shape[-2]
        super().__init__(length, kept)
        self.held = held
        self.is_sliding = kept < length
        self.unread = {"keys"}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.unread.discard("keys")
        keys, values = (
            # Under autocast RoPE leaves keys in fp32 while values are in the shorter type.
            torch.cat([held.to(new.dtype).expand(len(new), -1, -1, -1), new], dim=-2)
            for held, new in zip(on(key_states.device, self.held), (key_states, value_states), strict=True)
        )
        return keys, values


class _Read(dict[int, Tensor | None]):
    """States by place; says when one is looked at."""

    def __init__(self, states: Mapping[int, Tensor | None], unread: set[str]) -> None:
        super().__init__(states)
        self._unread = unread

    def __getitem__(self, place: int) -> Tensor | None:
        self._unread.discard("state")
        return super().__getitem__(place)


class StateLayer(LinearAttentionLayer):
    """One recurrent layer's state after the prefix, a copy for each of `batch` rows, which the layer overwrites.

    states: what `states_of` gave for the layer, each with a leading dimension of 1.
    """

    def __init__(self, states: Mapping[str, Tensor], batch: int) -> None:
        super().__init__(number_of_states=1 + max(int(name.split(".")[1]) for name in states))
        for name, state in states.items():
            kind, index = name.split(".")[0], int(name.split(".")[1])
            copies = state.repeat(batch, *[1] * (state.ndim - 1))
            getattr(self, f"{kind}_states")[index] = copies
            getattr(self, f"is_{kind}_states_initialized")[index] = True
            self.has_previous_state[index] = True
            if kind == "conv":
                self.conv_kernel_size[index] = state.shape[-1]
            self.device, self.dtype = state.device, state.dtype  # type: ignore[assignment]
        # Layers take their state by hand when there is one token: no method of this class sees every reader.
        self.unread = {"state"}
        self.conv_states = _Read(self.conv_states, self.unread)
        self.recurrent_states = _Read(self.recurrent_states, self.unread)


class StateAndExpandedLayer(StateLayer, ExpandedLayer):  # type: ignore[override]
    """A layer that has both, side by side (Falcon-H1) or one after the other (Zamba-2)."""

    def __init__(self, held: KeysAndValues, length: int, states: Mapping[str, Tensor], batch: int) -> None:
        ExpandedLayer.__init__(self, held, length)
        StateLayer.__init__(self, states, batch)
        self.unread.add("keys")

    lazy_initialization = CacheLayer.lazy_initialization


def states_of(layer: Any) -> dict[str, Tensor]:
    """Copies of what a recurrent layer of a cache holds, "conv.0", "recurrent.0" and so on; {} for other layers."""
    if not isinstance(layer, LinearAttentionLayer):
        return {}
    held = {"conv": layer.conv_states, "recurrent": layer.recurrent_states}
    return {
        f"{kind}.{index}": state.clone()
        for kind, states in held.items()
        for index, state in states.items()
        if state is not None
    }


def expanded_cache(
    stored: Sequence[KeysAndValues], states: Sequence[Mapping[str, Tensor]], length: int, batch: int
) -> Cache:
    """The cache that puts one prefix of `length` tokens in front of each of `batch` rows.

    stored: the prefix's keys and values, one for each layer. states: for each layer, or empty when no layer is
    recurrent.
    """
    layers: list[Any] = []
    for index, layer in enumerate(stored):
        state = states[index] if states else {}
        has_keys = layer[0].numel() > 0
        if state and has_keys:
            layers.append(StateAndExpandedLayer(layer, length, state, batch))
        elif state:
            layers.append(StateLayer(state, batch))
        else:
            layers.append(ExpandedLayer(layer, length) if has_keys else _EmptyLayer())
    return Cache(layers=layers)


def unread_layers(cache: Cache) -> list[int]:
    """Layers of an `expanded_cache` that did not ask for all they were given."""
    return [index for index, layer in enumerate(cache.layers) if getattr(layer, "unread", None)]


def unknown_state(body: nn.Module) -> str | None:
    """Name of the first kind of cache layer of `body` that `expanded_cache` does not know; None without."""
    # Exact types: what derives from these adds a state of its own.
    return next((kind.__name__ for kind in _kinds(body) if kind not in _KEYS_ALONE + _RECURRENT), None)


def is_recurrent(body: nn.Module) -> bool:
    """Whether a layer of `body` carries a state from token to token."""
    return any(kind in _RECURRENT for kind in _kinds(body))


def _kinds(body: Any) -> list[type]:
    """Of the cache's layer for each layer of `body`."""
    return [type(layer) for layer in DynamicCache(config=body.config).layers]

"""Prefixes as a transformers cache for a packed row: in front of the row's own keys, read-only.

Part of the seam to transformers, which re-exports it; checked on 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from opcd_fast.models.caches.stream import KeysAndValues, PrefixStream


class FrozenLayer(CacheLayerMixin):
    """One layer's prefixes: `update` returns them in front of the new keys and stores nothing.

    stream: gives keys and values (1, H_kv, P_i, d) of layer `index`, in the order of the packed row's prefix groups.
    RoPE is applied before a cache sees keys, so they are final.
    """

    is_sliding = False

    def __init__(self, stream: PrefixStream, index: int) -> None:
        super().__init__()
        self.stream, self.index = stream, index
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with self.stream.layer(self.index, key_states) as (keys, values):
            whole_keys = torch.cat([*keys, key_states], dim=-2)
            # Under autocast RoPE leaves keys in fp32 while values are in the shorter type.
            return whole_keys, torch.cat([*(v.to(value_states.dtype) for v in values), value_states], dim=-2)

    def get_seq_length(self, *args: Any) -> int:
        return sum(keys.shape[-2] for keys, _ in self.stream.layers[self.index])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before 5.18


def frozen_cache(layers: Sequence[Sequence[KeysAndValues]]) -> Cache:
    """A cache of `FrozenLayer`s, layers[layer][prefix]."""
    stream = PrefixStream(layers)
    return Cache(layers=[FrozenLayer(stream, index) for index in range(len(layers))])

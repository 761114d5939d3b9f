"""Keys and values of a context as transformers' caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "buffered": ("buffered_cache",),
        "expanded": ("expanded_cache", "is_recurrent", "states_of", "unknown_state", "unread_layers"),
        "prefix": ("GrowingLayer", "PrefixCache", "prefix_cache"),
    },
)

if TYPE_CHECKING:
    from opcd_fast.models.caches.buffered import buffered_cache
    from opcd_fast.models.caches.expanded import (
        expanded_cache,
        is_recurrent,
        states_of,
        unknown_state,
        unread_layers,
    )
    from opcd_fast.models.caches.prefix import GrowingLayer, PrefixCache, prefix_cache

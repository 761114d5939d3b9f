"""Keys and values of a context as transformers' caches."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.models.caches.buffered import BufferedCache, Slots
    from opcd_fast.models.caches.expanded import expanded_cache, is_recurrent, states_of, unknown_state, unread_layers
    from opcd_fast.models.caches.prefix import GrowingLayer, PrefixCache, prefix_cache

__getattr__, __dir__, __all__ = door(__name__)

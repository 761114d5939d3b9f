"""Keys and values of a context as transformers' caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "buffered": ("buffered_cache",),
        "frozen": ("FrozenLayer", "frozen_cache"),
        "stream": ("KeysAndValues", "PrefixStream"),
    },
)

if TYPE_CHECKING:
    from opcd_fast.models.caches.buffered import buffered_cache
    from opcd_fast.models.caches.frozen import FrozenLayer, frozen_cache
    from opcd_fast.models.caches.stream import KeysAndValues, PrefixStream

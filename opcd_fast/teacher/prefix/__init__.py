"""The shared prefix: read once, kept, extended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "memory": ("PrefixMemory",),
        "shared": ("SharedPrefix",),
    },
)

if TYPE_CHECKING:
    from opcd_fast.teacher.prefix.memory import PrefixMemory
    from opcd_fast.teacher.prefix.shared import SharedPrefix

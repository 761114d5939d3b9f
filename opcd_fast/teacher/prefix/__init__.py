"""The shared prefix: read once, kept, extended."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.teacher.prefix.memory import PrefixMemory
    from opcd_fast.teacher.prefix.shared import SharedPrefix

__getattr__, __dir__, __all__ = door(__name__)

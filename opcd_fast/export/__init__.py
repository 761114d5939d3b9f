"""What leaves a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "card": ("card_of",),
        "folder": ("export", "refuse"),
        "hub": ("check_can_push", "push", "refuse_local_base"),
        "options": ("ExportOptions",),
        "source": ("find_source",),
    },
)

if TYPE_CHECKING:
    from opcd_fast.export.card import card_of
    from opcd_fast.export.folder import export, refuse
    from opcd_fast.export.hub import check_can_push, push, refuse_local_base
    from opcd_fast.export.options import ExportOptions
    from opcd_fast.export.source import find_source

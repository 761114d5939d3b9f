"""What leaves a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "card": ("card_of",),
        "folder": ("ExportOptions", "export", "refuse"),
        "hub": ("check_can_push", "is_hub_id", "push"),
        "source": ("find_source",),
    },
)

if TYPE_CHECKING:
    from opcd_fast.export.card import card_of
    from opcd_fast.export.folder import ExportOptions, export, refuse
    from opcd_fast.export.hub import check_can_push, is_hub_id, push
    from opcd_fast.export.source import find_source

"""What leaves a run."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.export.card import card_of
    from opcd_fast.export.folder import export, refuse
    from opcd_fast.export.hub import check_can_push, push, refuse_local_base
    from opcd_fast.export.options import ExportOptions
    from opcd_fast.export.source import find_source

__getattr__, __dir__, __all__ = door(__name__)

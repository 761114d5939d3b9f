"""The settings of a run and what they refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "checks": ("OFFLOAD_NEEDS",),
        "config": ("OPCDConfig",),
        "gone": ("refuse_gone", "without_gone"),
        "options": ("check_names", "option_names", "read_yaml", "typed_values"),
    },
)

if TYPE_CHECKING:
    from opcd_fast.training.settings.checks import OFFLOAD_NEEDS
    from opcd_fast.training.settings.config import OPCDConfig
    from opcd_fast.training.settings.gone import refuse_gone, without_gone
    from opcd_fast.training.settings.options import check_names, option_names, read_yaml, typed_values

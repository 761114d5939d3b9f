"""The settings of a run and what they refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "checks": ("goes_with",),
        "config": ("OPCDConfig", "settings_with"),
        "gone": ("refuse_gone", "without_gone"),
        "setting": ("group_of", "settings_of"),
        "options": ("check_names", "option_names", "read_yaml", "typed_values"),
    },
)

if TYPE_CHECKING:
    from opcd_fast.training.settings.checks import goes_with
    from opcd_fast.training.settings.config import OPCDConfig, settings_with
    from opcd_fast.training.settings.gone import refuse_gone, without_gone
    from opcd_fast.training.settings.options import check_names, option_names, read_yaml, typed_values
    from opcd_fast.training.settings.setting import group_of, settings_of

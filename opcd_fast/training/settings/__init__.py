"""The settings of a run and what they refuse."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.training.settings.checks import AUTO, goes_with
    from opcd_fast.training.settings.config import OPCDConfig, check_values, known_settings, settings_with
    from opcd_fast.training.settings.options import check_names, option_names, read_yaml, typed_values
    from opcd_fast.training.settings.setting import OneOf, Within, group_of, settings_of

__getattr__, __dir__, __all__ = door(__name__)

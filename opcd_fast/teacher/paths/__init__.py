"""The ways to run sequences after their contexts, which one is taken, and its check."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.teacher.paths.choice import PathChoice
    from opcd_fast.teacher.paths.forward import concat_forward, merge_forward, pad_forward

__getattr__, __dir__, __all__ = door(__name__)

"""The ways to run sequences after their contexts, which one is taken, and its check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "choice": ("PathChoice",),
        "forward": ("concat_forward", "merge_forward", "pad_forward"),
        "verification": ("full_precision",),
    },
)

if TYPE_CHECKING:
    from opcd_fast.teacher.paths.choice import PathChoice
    from opcd_fast.teacher.paths.forward import concat_forward, merge_forward, pad_forward
    from opcd_fast.teacher.paths.verification import full_precision

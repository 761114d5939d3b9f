"""The model that sees the context: several contexts, placement, scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "budget": ("default_batch_bytes",),
        "context_teacher": ("ContextTeacher",),
        "moving": ("MovingWeights", "copy_of_trained"),
        "offload": ("Offload", "OffloadedTeacher"),
        "prefix": ("SharedPrefix",),
        "remote": ("RemoteTeacher",),
        "scoring": ("ContinuationScores", "score_continuations"),
    },
)

if TYPE_CHECKING:
    from opcd_fast.teacher.budget import default_batch_bytes
    from opcd_fast.teacher.context_teacher import ContextTeacher
    from opcd_fast.teacher.moving import MovingWeights, copy_of_trained
    from opcd_fast.teacher.offload import Offload, OffloadedTeacher
    from opcd_fast.teacher.prefix import SharedPrefix
    from opcd_fast.teacher.remote import RemoteTeacher
    from opcd_fast.teacher.scoring import ContinuationScores, score_continuations

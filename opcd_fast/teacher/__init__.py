"""The model that sees the context: several contexts, placement, scoring."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.teacher.budget import default_batch_bytes
    from opcd_fast.teacher.context_teacher import ContextTeacher
    from opcd_fast.teacher.moving import MovingWeights, copy_of_trained
    from opcd_fast.teacher.offload import Offload, OffloadedTeacher
    from opcd_fast.teacher.prefix import SharedPrefix
    from opcd_fast.teacher.remote import RemoteTeacher
    from opcd_fast.teacher.scoring import ContinuationScores, score_continuations

__getattr__, __dir__, __all__ = door(__name__)

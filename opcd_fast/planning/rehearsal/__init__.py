"""One step on tensors without data, counted."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.planning.rehearsal.job import Job, job_of
    from opcd_fast.planning.rehearsal.meter import Peak
    from opcd_fast.planning.rehearsal.phases import Rehearsal, rehearse

__getattr__, __dir__, __all__ = door(__name__)

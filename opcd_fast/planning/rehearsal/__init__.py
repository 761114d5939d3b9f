"""One step on tensors without data, counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {"job": ("Job", "job_of"), "meter": ("Peak",), "phases": ("Rehearsal", "rehearse")},
)

if TYPE_CHECKING:
    from opcd_fast.planning.rehearsal.job import Job, job_of
    from opcd_fast.planning.rehearsal.meter import Peak
    from opcd_fast.planning.rehearsal.phases import Rehearsal, rehearse

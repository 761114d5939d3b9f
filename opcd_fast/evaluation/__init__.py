"""What became of a run: check, diff, demo, and what is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "demo": ("run_demo",),
        "diff": ("compare_runs",),
        "info": ("describe", "where_it_ran"),
        "staleness": ("CARD", "check"),
    },
)

if TYPE_CHECKING:
    from opcd_fast.evaluation.demo import run_demo
    from opcd_fast.evaluation.diff import compare_runs
    from opcd_fast.evaluation.info import describe, where_it_ran
    from opcd_fast.evaluation.staleness import CARD, check

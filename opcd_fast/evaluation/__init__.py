"""What became of a run: check, diff, demo, probes, and what is installed."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.evaluation.check import CARD, check_run, read_card
    from opcd_fast.evaluation.demo import run_demo
    from opcd_fast.evaluation.diff import compare_runs
    from opcd_fast.evaluation.info import describe, where_it_ran
    from opcd_fast.evaluation.probes import Abilities, Arm, tried
    from opcd_fast.evaluation.reader import MICRO_BATCH_TOKENS, Distance, Reader, Reading, distances

__getattr__, __dir__, __all__ = door(__name__)

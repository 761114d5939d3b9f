"""Systems side by side: same budget, several seeds, measured in the same way."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.evaluation.compare.measurement import Yardstick
    from opcd_fast.evaluation.compare.runs import Comparison, run_all
    from opcd_fast.evaluation.compare.systems import check_common, parse_systems
    from opcd_fast.evaluation.compare.table import as_markdown, plot_comparison, summarize

__getattr__, __dir__, __all__ = door(__name__)

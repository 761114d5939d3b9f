"""The proof that a run worked: card, README and page."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.evaluation.report.measurement import ReportOptions, measure
    from opcd_fast.evaluation.report.page import readme, without_texts, write_report
    from opcd_fast.evaluation.report.scores import by_function, by_pattern
    from opcd_fast.evaluation.report.words import rounding

__getattr__, __dir__, __all__ = door(__name__)

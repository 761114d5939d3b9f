"""The proof that a run worked: card, README and page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "files": ("without_texts", "write_report"),
        "hub_card": ("readme",),
        "measurement": ("ReportOptions", "measure"),
        "scorers": ("by_function", "by_pattern"),
        "words": ("mean", "missing_arms", "rate", "rounding", "tokens"),
    },
)

if TYPE_CHECKING:
    from opcd_fast.evaluation.report.files import without_texts, write_report
    from opcd_fast.evaluation.report.hub_card import readme
    from opcd_fast.evaluation.report.measurement import ReportOptions, measure
    from opcd_fast.evaluation.report.scorers import by_function, by_pattern
    from opcd_fast.evaluation.report.words import mean, missing_arms, rate, rounding, tokens

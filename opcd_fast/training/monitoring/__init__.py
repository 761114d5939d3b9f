"""What is seen of a run while it goes: journal, display, plots, trackers, warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "health": ("check_finite",),
        "held_out": ("fixed_sequences", "held_out_record"),
        "journal": ("Journal", "TrainResult"),
        "plots": ("drawn", "plot_kl", "save_plot"),
        "tracking": ("check_installed",),
    },
)

if TYPE_CHECKING:
    from opcd_fast.training.monitoring.health import check_finite
    from opcd_fast.training.monitoring.held_out import fixed_sequences, held_out_record
    from opcd_fast.training.monitoring.journal import Journal, TrainResult
    from opcd_fast.training.monitoring.plots import drawn, plot_kl, save_plot
    from opcd_fast.training.monitoring.tracking import check_installed

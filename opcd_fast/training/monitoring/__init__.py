"""What is seen of a run while it goes: journal, display, plots, trackers, warnings."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.training.monitoring.health import check_finite
    from opcd_fast.training.monitoring.held_out import fixed_sequences, held_out_record
    from opcd_fast.training.monitoring.journal import Journal, TrainResult
    from opcd_fast.training.monitoring.plots import drawn, plot_kl, save_plot
    from opcd_fast.training.monitoring.tracking import check_installed

__getattr__, __dir__, __all__ = door(__name__)

"""The table as a picture: one panel per measure, a mark for the mean, a bar for the interval, a dot for each seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opcd_fast.evaluation.compare.table import MEASURES, interval


def plot_comparison(path: Path, summary: Mapping[str, Any]) -> None:
    """PNG of the measures that were taken."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    systems = summary["systems"]
    shown = [m for m in MEASURES if all(m.name in s["summary"] for s in systems.values())]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.2 * len(shown), 0.9 + 0.4 * len(systems)), sharey=True, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for panel, measure in zip(axes[0], shown):
        for height, found in enumerate(systems.values()):
            numbers = found["summary"][measure.name]
            ends = interval(numbers)
            if ends is not None:
                panel.plot(ends, [height, height], color="grey", lw=2)
            panel.plot([run[measure.name] for run in found["runs"]], [height] * len(found["runs"]), "k.", ms=4)
            panel.plot([numbers["mean"]], [height], "D", ms=6, color="tab:blue")
        panel.set_title(measure.title, fontsize=9)
        panel.set_yticks(range(len(systems)), list(systems))
        panel.grid(alpha=0.3)
        if measure.share:
            panel.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)

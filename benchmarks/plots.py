"""Plots of one run as small SVGs: time and memory where one size of the cases varies, and errors against the KL.

The same run gives the same bytes: no dates and no random identifiers in the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.schema import Head, Row

SIZES = {"loss": ("N", "V", "D"), "teacher": ("context", "response", "batch")}  # that cases vary one at a time
# One colour per implementation in every plot, from a palette that colour-blind readers can tell apart.
COLOURS = {
    "opcd_fast": "#0072B2", "opcd_fast-triton": "#0072B2", "opcd_fast-native": "#0072B2", "opcd_fast-torch": "#56B4E9",
    "opcd_fast-merge": "#0072B2", "opcd_fast-merge-rebuilt": "#56B4E9", "opcd_fast-pad": "#009E73", "trl": "#D55E00",
    "transformers-cache": "#D55E00", "transformers-cache-rebuilt": "#E69F00", "liger-fused": "#009E73",
    "liger-chunked": "#44AA99", "eager-fp32": "#E69F00", "fp32-logits": "#E69F00", "eager-bf16-logits": "#CC79A7",
    "bf16-logits": "#CC79A7", "fp16-logits": "#882255", "gemms": "#999999",
}  # fmt: skip
Points = dict[str, list[tuple[float, float]]]  # of each implementation, by x


@dataclass(frozen=True)
class Plot:
    title: str
    file: str
    x: str
    y: str
    panels: dict[str, Points]  # at least two values of x in each


def of(head: Head, rows: Sequence[Row]) -> list[Plot]:
    """The plots for which a run has at least two points."""
    if head.table not in (*SIZES, "bf16_logits"):
        return []
    stem, sizes = f"{head.table}_{head.device.slug}", SIZES.get(head.table, ())
    timed = [row for row in rows if row.group in ("main", *sizes)]
    errors = [row for row in rows if row.group == "accuracy"]
    plots = [Plot(f"{name} against {size}", f"{stem}_{name}_{size.lower()}.svg", size, f"{name}, {unit}",
                  _panels(timed, size, name, scale))
             for size in sizes for name, unit, scale in (("time", "ms", 1.0), ("peak", "MiB", 2.0**20))]  # fmt: skip
    plots.append(Plot("error against the mean KL", f"{stem}_error_kl.svg", "mean KL", "error of dL/dh",
                      _panels(errors, "mean_kl", "dL/dh")))  # fmt: skip
    return [plot for plot in plots if plot.panels]


def _panels(rows: Sequence[Row], x: str, y: str, scale: float = 1.0) -> dict[str, Points]:
    """Of rows that have all but x in common, where at least two values of x were measured; points sorted."""
    panels: dict[str, Points] = {}
    for row in rows:
        at, found = row.shape.get(x, row.get(x)), row.get(y)
        if row.status == "ok" and at is not None and found is not None:
            common = [f"{name} {size:,}" for name, size in row.shape.items() if name != x]
            common += [text for name, text in row.settings.items() if name != "gradient"]
            lines = panels.setdefault(", ".join(common), {})
            lines.setdefault(row.implementation, []).append((at, found / scale))
    return {panel: {name: sorted(set(points)) for name, points in lines.items()} for panel, lines in panels.items()
            if len({x for points in lines.values() for x, _ in points}) > 1}  # fmt: skip


def draw(plots: Sequence[Plot], folder: Path) -> None:
    """Write them, a figure with its panels each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"svg.hashsalt": "opcd-fast", "svg.fonttype": "none", "font.size": 9, "figure.constrained_layout.use": True}
    )
    for plot in plots:
        wide = 4.6 * len(plot.panels) + 1.9
        figure, axes = pyplot.subplots(1, len(plot.panels), figsize=(wide, 3.6), squeeze=False, sharey=True)
        names: dict[str, Any] = {}
        for axis, (panel, lines) in zip(axes[0], plot.panels.items(), strict=True):
            for name, points in lines.items():
                (names[name],) = axis.plot(*zip(*points), color=COLOURS.get(name, "#000000"), marker="o", ms=4)
            axis.set(xlabel=plot.x, xscale="log", yscale="log")
            axis.set_title(panel, fontsize=9)
            axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes[0][0].set_ylabel(plot.y)
        figure.legend(names.values(), names.keys(), loc="outside right center", fontsize=8, frameon=False)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / plot.file, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)

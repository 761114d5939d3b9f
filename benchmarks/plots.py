"""Plots of one run as small SVGs: time and memory where one size of the cases varies, and errors against the KL.

The same run gives the same bytes: no dates and no random identifiers in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    stem = f"{head.table}_{head.device.slug}"
    timed = [row for row in rows if row.group in ("main", *SIZES.get(head.table, ()))]
    plots = []
    for size in SIZES.get(head.table, ()):
        for name, unit, scale in (("time", "ms", 1.0), ("peak", "MiB", 2.0**20)):
            panels = _panels(timed, lambda row: row.shape[size], name, scale, _others(head.table, size))  # noqa: B023
            plots.append(Plot(f"{name} against {size}", f"{stem}_{name}_{size.lower()}.svg", size, f"{name}, {unit}",
                              panels))  # fmt: skip
    errors = [row for row in rows if row.group == "accuracy"]
    panels = _panels(errors, lambda row: row.get("mean_kl") or 0.0, "dL/dh", 1.0, _others("loss"))
    plots.append(Plot("error against the mean KL", f"{stem}_error_kl.svg", "mean KL", "error of dL/dh", panels))
    return [plot for plot in plots if plot.panels]


def _others(table: str, size: str = "") -> Callable[[Row], str]:
    """A panel's title: what its rows have in common."""
    names = [name for name in SIZES[table] if name != size and (size or name != "N")]
    settings = ("model", "dtype", "head")
    return lambda row: ", ".join([*(f"{name} {row.shape[name]:,}" for name in names),
                                  *(row.settings[name] for name in settings if name in row.settings)])  # fmt: skip


def _panels(
    rows: Sequence[Row], x: Callable[[Row], float], name: str, scale: float, title: Callable[[Row], str]
) -> dict[str, Points]:
    """Those with at least two values of x, their points sorted."""
    panels: dict[str, Points] = {}
    for row in rows:
        if row.status == "ok" and (y := row.get(name)) is not None:
            panels.setdefault(title(row), {}).setdefault(row.implementation, []).append((x(row), y / scale))
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

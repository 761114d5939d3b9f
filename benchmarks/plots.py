"""Plots of one report: time against N, D and V, peak memory against N, gradient error against KL, as small SVGs.

The same report gives the same bytes: no dates and no random identifiers in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.schema import BOUND, Report, Row
from benchmarks.targets import ACCURACY

# One colour per implementation in every plot, from a palette that colour-blind readers can tell apart.
_STYLES = {
    "opcd_fast-triton": ("#0072B2", "o"),
    "opcd_fast-native": ("#0072B2", "o"),
    "opcd_fast-torch": ("#56B4E9", "s"),
    "trl": ("#D55E00", "^"),
    "liger-fused": ("#009E73", "v"),
    "liger-chunked": ("#44AA99", "<"),
    "eager-fp32": ("#E69F00", "D"),
    "eager-bf16-logits": ("#CC79A7", "P"),
    "compile-fp32": ("#999999", "X"),
    "compile-bf16-logits": ("#882255", "X"),
    "opcd_fast-merge": ("#0072B2", "o"),
    "opcd_fast-merge-rebuilt": ("#56B4E9", "s"),
    "opcd_fast-pad": ("#009E73", "v"),
    "concat": ("#000000", "D"),
    "transformers-cache": ("#D55E00", "^"),
    "transformers-cache-rebuilt": ("#E69F00", "<"),
    "opcd_fast-merge, model": ("#0072B2", "+"),
    "opcd_fast-merge-rebuilt, model": ("#56B4E9", "x"),
}
_SIZES = ("N", "V", "D")
PEAK = "peak memory, MiB"
TIME = "time / bare products"
ERROR = "relative error of dL/dh"
SPEEDUP = "speed-up over concat"
_REFERENCES = {TIME: 1.0, ERROR: ACCURACY, SPEEDUP: 1.0}  # dotted lines


def draw(report: Report, folder: Path, stem: str) -> list[tuple[str, Path]]:
    """Write the plots for which the report has at least two points; (title, path) of each."""
    written = []
    for size in _SIZES:
        panels = swept(report.rows, size, _time_over_bound)
        written += figure(panels, size, TIME, f"Time against {size}", folder / f"{stem}_time_{size.lower()}.svg")
    panels = swept(report.rows, "N", lambda row: None if row.peak_bytes is None else row.peak_bytes / 2**20)
    written += figure(panels, "N", PEAK, "Peak memory against N", folder / f"{stem}_memory_n.svg")
    written += figure(
        accuracy(report.rows),
        "mean KL",
        ERROR,
        "Gradient error against the KL",
        folder / f"{stem}_error_kl.svg",
    )
    return written


Points = dict[str, list[tuple[float, float]]]  # of each implementation, by x


def swept(rows: Iterable[Row], size: str, value: Callable[[Row], float | None]) -> dict[str, Points]:
    """Panels of the trained-head rows that differ in one size alone, where at least two values of it were measured.

    Workspaces other than the default and the accuracy rows, whose inputs are small on purpose, are left out.
    """
    panels: dict[str, Points] = {}
    for row in rows:
        if row.frozen or row.group in ("accuracy", "workspace") or row.status != "ok" or row.implementation == BOUND:
            continue
        y = value(row)
        if y is None:
            continue
        others = ", ".join(f"{name} = {getattr(row, name):,}" for name in _SIZES if name != size)
        panel = panels.setdefault(f"{others}, {row.dtype}", {})
        panel.setdefault(row.implementation, []).append((getattr(row, size), y))
    return with_two_points(panels)


def accuracy(rows: Iterable[Row]) -> dict[str, Points]:
    panels: dict[str, Points] = {}
    for row in rows:
        if row.group != "accuracy" or row.status != "ok":
            continue
        panel = panels.setdefault(f"V = {row.V:,}, D = {row.D:,}, {row.dtype}", {})
        panel[row.implementation] = [
            (e.mean_kl, e.relative_error) for e in row.gradient_error if e.of == "hidden" and e.relative_error
        ]
    return with_two_points(panels)


def with_two_points(panels: dict[str, Points]) -> dict[str, Points]:
    """The panels with at least two values of x, their points sorted."""
    kept = {}
    for title, lines in panels.items():
        sorted_lines = {name: sorted(set(points)) for name, points in lines.items()}
        if len({x for points in sorted_lines.values() for x, _ in points}) > 1:
            kept[title] = sorted_lines
    return kept


def _time_over_bound(row: Row) -> float | None:
    return None if row.bound_fraction is None else 1 / row.bound_fraction


def figure(panels: dict[str, Points], x: str, y: str, title: str, path: Path) -> list[tuple[str, Path]]:
    """Write one figure with a panel for each of `panels`; nothing when there is none."""
    if not panels:
        return []
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels) + 1.9, 3.6), squeeze=False, sharey=True)
    names: dict[str, Any] = {}
    for axis, (panel, lines) in zip(axes[0], panels.items()):
        for name, points in lines.items():
            colour, marker = _STYLES.get(name, ("#000000", "."))
            line = ":" if name.endswith(", model") else "-"
            (names[name],) = axis.plot(*zip(*points), color=colour, marker=marker, ls=line, markersize=5, label=name)
        axis.set(title=panel, xlabel=x, xscale="log", yscale="log")
        _ticks(axis, sorted({x for points in lines.values() for x, _ in points}), y)
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.title.set_fontsize(9)
    for axis in axes[0]:
        if y in _REFERENCES:
            axis.axhline(_REFERENCES[y], color="#000000", linewidth=0.8, linestyle=":")
        low, high = axis.get_ylim()
        if high < 8 * low:  # a logarithmic axis from 2e-3 to 3e-3 would have no tick
            axis.set_ylim(low / 2, 2 * high)
    axes[0][0].set_ylabel(y)
    figure.legend(names.values(), names.keys(), loc="outside right center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return [(title, path)]


def _ticks(axis: Any, values: list[float], y: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if values[0] >= 1:  # sizes: exactly those that were measured
        axis.set_xticks(values, [f"{int(value):,}" for value in values])
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_locator(NullLocator())
    if y in (TIME, PEAK, SPEEDUP):
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"svg.hashsalt": "opcd-fast", "svg.fonttype": "none", "font.size": 9, "figure.constrained_layout.use": True}
    )
    return pyplot

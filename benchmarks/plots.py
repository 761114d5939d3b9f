"""Plots of one run as small SVGs: time, memory and error of the loss, speed-up and memory of the teacher.

The same run gives the same bytes: no dates and no random identifiers in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.schema import BOUND, Head, Row

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
PEAK, TIME, ERROR = "peak memory, MiB", "time / bare products", "relative error of dL/dh"
SPEEDUP = "speed-up over concat"
_REFERENCES = {TIME: 1.0, ERROR: 3e-3, SPEEDUP: 1.0}  # dotted lines
_LABELS = {"context": "context, tokens", "response": "answer, tokens", "batch": "answers in the batch"}

Points = dict[str, list[tuple[float, float]]]  # of each implementation, by x
Measure = Callable[[Row, dict[str, Row]], "float | None"]  # of a row among those of its case


@dataclass(frozen=True)
class Plot:
    title: str
    file: str
    x: str
    y: str
    panels: dict[str, Points]  # at least two values of x in each


def of(table: str, head: Head, rows: Sequence[Row]) -> list[Plot]:
    """The plots for which a run has at least two points."""
    stem = f"{table}_{head.device.slug}"
    made = []
    if table == "loss":
        chosen = [row for row in rows if row.settings["head"] == "full" and row.group not in ("accuracy", "workspace")]
        for size in "NVD":
            panels = swept(chosen, "NVD", size, lambda row, _: 1 / share if (share := row.get("of_bound")) else None)
            made.append(Plot(f"Time against {size}", f"{stem}_time_{size.lower()}.svg", size, TIME, panels))
        made.append(Plot("Peak memory against N", f"{stem}_memory_n.svg", "N", PEAK, swept(chosen, "NVD", "N", _peak)))
        made.append(Plot("Gradient error against the KL", f"{stem}_error_kl.svg", "mean KL", ERROR, accuracy(rows)))
    if table == "teacher":
        chosen = [row for row in rows if row.group != "check"]
        for size, word in (("context", "the context's length"), ("response", "the answers' length")):
            made.append(Plot(f"Speed-up over concatenation against {word}", f"{stem}_speedup_{size}.svg", _LABELS[size],
                             SPEEDUP, swept(chosen, _LABELS, size, _speedup, modelled)))  # fmt: skip
        made.append(Plot("Peak memory against the batch", f"{stem}_memory_batch.svg", _LABELS["batch"], PEAK,
                         swept(chosen, _LABELS, "batch", _peak)))  # fmt: skip
    return [plot for plot in made if plot.panels]


def swept(
    rows: Sequence[Row], sizes: Any, size: str, measure: Measure, model: Measure | None = None
) -> dict[str, Points]:
    """Panels of the rows that differ in one size alone, where at least two values of it were measured.

    model: what arithmetic says of ours, a line of its own.
    """
    panels: dict[str, Points] = {}
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.implementation] = row
    for row in rows:
        if row.implementation == BOUND:
            continue
        others = [f"{name} = {row.shape[name]:,}" for name in sizes if name != size]
        told = row.settings.get("model") or row.settings["dtype"]
        panel = panels.setdefault(", ".join([*others, told]), {})
        y = measure(row, cases[row.case]) if row.status == "ok" else None
        if y is not None:
            panel.setdefault(row.implementation, []).append((row.shape[size], y))
        limit = model(row, cases[row.case]) if model and row.implementation.startswith("opcd_fast-merge") else None
        if limit is not None:
            panel.setdefault(f"{row.implementation}, model", []).append((row.shape[size], limit))
    return _with_two_points(panels)


def accuracy(rows: Sequence[Row]) -> dict[str, Points]:
    panels: dict[str, Points] = {}
    for row in rows:
        if row.group == "accuracy" and row.status == "ok":
            title = f"V = {row.shape['V']:,}, D = {row.shape['D']:,}, {row.settings['dtype']}"
            point = (row.get("mean_kl") or 0.0, row.get("dL/dh") or 0.0)
            panels.setdefault(title, {}).setdefault(row.implementation, []).append(point)
    return _with_two_points(panels)


def _peak(row: Row, _: dict[str, Row]) -> float | None:
    return None if (peak := row.get("peak")) is None else peak / 2**20


def _speedup(row: Row, case: dict[str, Row]) -> float | None:
    concat = case["concat"].get("time") if "concat" in case else None
    return concat / (row.get("time") or 1.0) if concat else None


def modelled(row: Row, case: dict[str, Row]) -> float | None:
    """The speed-up if every FLOP cost the same: no measurement."""
    flops = row.get("flops")
    concat = case["concat"].get("flops") if "concat" in case else None
    return concat / flops if concat and flops else None


def _with_two_points(panels: dict[str, Points]) -> dict[str, Points]:
    """The panels with at least two values of x, their points sorted."""
    kept = {}
    for title, lines in panels.items():
        if len({x for points in lines.values() for x, _ in points}) > 1:
            kept[title] = {name: sorted(set(points)) for name, points in lines.items()}
    return kept


def draw(plots: Sequence[Plot], folder: Path) -> None:
    """Write them, a figure with its panels each."""
    for plot in plots:
        pyplot = _pyplot()
        wide = 4.6 * len(plot.panels) + 1.9
        figure, axes = pyplot.subplots(1, len(plot.panels), figsize=(wide, 3.6), squeeze=False, sharey=True)
        names: dict[str, Any] = {}
        for axis, (panel, lines) in zip(axes[0], plot.panels.items(), strict=True):
            for name, points in lines.items():
                colour, marker = _STYLES.get(name, ("#000000", "."))
                line = ":" if name.endswith(", model") else "-"
                (names[name],) = axis.plot(*zip(*points), color=colour, marker=marker, ls=line, ms=5, label=name)
            axis.set(title=panel, xlabel=plot.x, xscale="log", yscale="log")
            _ticks(axis, sorted({x for points in lines.values() for x, _ in points}), plot.y)
            axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
            axis.title.set_fontsize(9)
        for axis in axes[0]:
            if plot.y in _REFERENCES:
                axis.axhline(_REFERENCES[plot.y], color="#000000", linewidth=0.8, linestyle=":")
            low, high = axis.get_ylim()
            if high < 8 * low:  # a logarithmic axis from 2e-3 to 3e-3 would have no tick
                axis.set_ylim(low / 2, 2 * high)
        axes[0][0].set_ylabel(plot.y)
        figure.legend(names.values(), names.keys(), loc="outside right center", fontsize=8, frameon=False)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / plot.file, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _ticks(axis: Any, values: list[float], y: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.xaxis.set_minor_locator(NullLocator())
    if values[0] >= 1:  # sizes: exactly those that were measured
        axis.set_xticks(values, [f"{int(value):,}" for value in values])
        axis.xaxis.set_minor_locator(NullLocator())
    else:
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

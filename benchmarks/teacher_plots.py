"""Plots of one report of the teacher: speed-up against context and answer length, peak memory against the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.plots import PEAK, SPEEDUP, Points, figure, with_two_points
from benchmarks.schema import BOUND, Report, TeacherRow
from benchmarks.teacher_implementations import CONCAT, OURS_BUILT, OURS_REBUILT
from benchmarks.teacher_report import modelled, speedup

_LABELS = {"context": "context, tokens", "response": "answer, tokens", "batch": "answers in the batch"}
Value = Callable[[TeacherRow, "TeacherRow | None"], "float | None"]


def draw(report: Report, folder: Path, stem: str) -> list[tuple[str, Path]]:
    """Write the plots for which the report has at least two points; (caption, path) of each."""
    written = []
    for size, word in (("context", "the context's length"), ("response", "the answers' length")):
        panels = swept(report.teacher, size, speedup, with_model=True)
        caption = f"Speed-up over concatenation against {word}"
        written += figure(panels, _LABELS[size], SPEEDUP, caption, folder / f"{stem}_speedup_{size}.svg")
    panels = swept(report.teacher, "batch", lambda row, _: None if not row.peak_bytes else row.peak_bytes / 2**20)
    path = folder / f"{stem}_memory_batch.svg"
    return written + figure(panels, _LABELS["batch"], PEAK, "Peak memory against the batch", path)


def swept(rows: Iterable[TeacherRow], size: str, value: Value, *, with_model: bool = False) -> dict[str, Points]:
    """Panels of the rows that differ in one size alone, where at least two values of it were measured."""
    chosen = [row for row in rows if row.group not in ("flex", "check") and row.implementation != BOUND]
    concat = {row.case: row for row in chosen if row.implementation == CONCAT}
    panels: dict[str, Points] = {}
    for row in chosen:
        others = ", ".join(f"{name} = {getattr(row, name):,}" for name in _LABELS if name != size)
        panel = panels.setdefault(f"{others}, {row.model}", {})
        y = value(row, concat.get(row.case)) if row.status == "ok" else None
        if y is not None:
            panel.setdefault(row.implementation, []).append((getattr(row, size), y))
        limit = modelled(row, concat.get(row.case)) if with_model else None
        if limit is not None and row.implementation in (OURS_BUILT, OURS_REBUILT):
            panel.setdefault(f"{row.implementation}, model", []).append((getattr(row, size), limit))
    return with_two_points(panels)

"""A run in at most 40 lines: the end of a machine's output is often all that one sees at first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.phase_rows import PhaseRow, Run, Value

LINES, WIDTH = 40, 190
FAILURES = 12


def summary(run: Run, phases: Sequence[str], folder: Path, seconds: float, dropped: Sequence[str]) -> list[str]:
    """First how each phase ended and what matters most of it, then what failed."""
    ends = run.ends()
    ended = [name for name in phases if name in ends]
    bad = [row for row in run.rows if row.status in ("failed", "timeout")]
    lines = [f"== summary: {len(ended)} of {len(phases)} phases in {seconds:.0f} s, {len(bad)} rows failed"]
    for name in phases:
        rows, end = run.of(name), ends.get(name)
        status = "not reached" if end is None else f"{end.status} {end.seconds:.0f} s"
        counts = ", ".join(
            f"{count} {status}" for status in ("ok", "failed", "skipped")
            if (count := sum(row.status == status for row in rows))
        )  # fmt: skip
        lines.append(_cut(f"{name:10} {status:12} {counts:28} {_shown(rows)}"))
    if bad:
        lines.append("failed:")
        lines += [_cut(f"  {row.phase} {row.name}: {row.reason}") for row in bad[:FAILURES]]
        if len(bad) > FAILURES:
            lines.append(f"  and {len(bad) - FAILURES} more")
    if run.damaged:
        lines.append(f"lines cut off: {', '.join(map(str, run.damaged))}")
    if dropped:
        lines.append(_cut(f"did not fit and went: {', '.join(dropped)}"))
    files = sorted(f"{path.name} {path.stat().st_size >> 10} KiB" for path in folder.iterdir() if path.is_file())
    lines.append(_cut(f"files in {folder}: {', '.join(files)}"))
    return lines[:LINES]


def _shown(rows: Sequence[PhaseRow]) -> str:
    """The first value of as many rows as the line holds, evenly over the phase."""
    told = [(row.name, *next(iter(row.values.items()))) for row in rows if row.status == "ok" and row.values]
    return "; ".join(f"{name} {number(found)}" for name, _, found in told)


def number(found: Value) -> str:
    """Four significant digits and the unit."""
    if found.value is None:
        return "NaN"
    unit = "" if found.unit == "1" else f" {found.unit}"
    if found.unit == "bytes":
        return f"{found.value / 2**20:,.0f} MiB"
    size = abs(found.value)
    text = f"{found.value:,.0f}" if size >= 1e4 or found.value == int(found.value) else f"{found.value:.4g}"
    return text + unit


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"

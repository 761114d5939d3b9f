"""A run in at most 40 lines: the end of a machine's output is often all that one sees at first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.schema import BAD, STATUSES, Row, Run, Value

LINES, WIDTH = 40, 190
FAILURES = 12
MORE = 3  # further lines of a phase


def summary(run: Run, phases: Sequence[str], folder: Path, seconds: float, dropped: Sequence[str]) -> list[str]:
    """First how each phase ended and what it measured, in as many lines as are left, then what failed."""
    ends = run.ends()
    ended = [name for name in phases if name in ends]
    bad = [row for row in run.rows if row.status in BAD]
    last = []
    if bad:
        last.append("failed:")
        last += [_cut(f"  {row.table} {row.name}: {row.note}") for row in bad[:FAILURES]]
        if len(bad) > FAILURES:
            last.append(f"  and {len(bad) - FAILURES} more")
    if run.damaged:
        last.append(f"lines cut off: {', '.join(map(str, run.damaged))}")
    if dropped:
        last.append(_cut(f"did not fit and went: {', '.join(dropped)}"))
    files = sorted(f"{path.name} {path.stat().st_size >> 10} KiB" for path in folder.iterdir() if path.is_file())
    last.append(_cut(f"files in {folder}: {', '.join(files)}"))

    lines = [f"== summary: {len(ended)} of {len(phases)} phases in {seconds:.0f} s, {len(bad)} rows failed"]
    spare = LINES - 1 - len(phases) - len(last)  # for further lines of phases
    for name in phases:
        rows, end = run.of(name), ends.get(name)
        status = "not reached" if end is None else f"{end.status} {end.seconds:.0f} s"
        counts = ", ".join(
            f"{count} {status}" for status in STATUSES
            if (count := sum(row.status == status for row in rows))
        )  # fmt: skip
        start, shown = f"{name:10} {status:12} {counts:28} ", _shown(rows)
        more = 0
        while len(start + shown) > WIDTH and more < MORE and spare:
            first = shown[: WIDTH - len(start)].rpartition("; ")[0]
            lines.append(start + first)
            start, shown = " " * 11, shown[len(first) :].removeprefix("; ")
            spare, more = spare - 1, more + 1
        lines.append(_cut(start + shown))
    return [line.rstrip() for line in lines + last][:LINES]


def _shown(rows: Sequence[Row]) -> str:
    """The first value of each row that has one, a case named once; tests are counted."""
    told = [(row.name, next(iter(row.values.values()))) for row in rows
            if row.status == "ok" and row.values and "::" not in row.case]  # fmt: skip
    texts, before = [], None
    for name, found in told:
        case, comma, what = name.partition(", ")
        texts.append(f"{what if comma and case == before else name} {number(found)}")
        before = case
    return "; ".join(texts)


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

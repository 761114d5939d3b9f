"""A run in at most 40 lines: the end of a machine's output is often all that one sees at first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from benchmarks.schema import BAD, STATUSES, Row, Run, Value

LINES, WIDTH = 40, 190
FAILURES = 12
OF_A_PHASE = 4  # lines


def summary(run: Run, phases: Sequence[str], folder: Path, seconds: float) -> list[str]:
    """First how each phase ended and what it measured, in as many lines as are left, then what failed."""
    ends = run.ends()
    bad = [row for row in run.rows if row.status in BAD]
    last = ["failed:"] if bad else []
    last += [f"  {row.table} {row.name}: {row.note}" for row in bad[:FAILURES]]
    if len(bad) > FAILURES:
        last.append(f"  and {len(bad) - FAILURES} more")
    if run.damaged:
        last.append(f"lines cut off: {', '.join(map(str, run.damaged))}")
    files = sorted(f"{path.name} {path.stat().st_size >> 10} KiB" for path in folder.iterdir() if path.is_file())
    last.append(f"files in {folder}: {', '.join(files)}")

    ended = sum(name in ends for name in phases)
    lines = [f"== summary: {ended} of {len(phases)} phases in {seconds:.0f} s, {len(bad)} rows failed"]
    for place, name in enumerate(phases, 1):
        rows, end = run.of(name), ends.get(name)
        status = "not reached" if end is None else f"{end.status} {end.seconds:.0f} s"
        counts = ", ".join(f"{count} {status}" for status in STATUSES
                           if (count := sum(row.status == status for row in rows)))  # fmt: skip
        told = wrap(f"{name:10} {status:12} {counts:28} {_shown(rows)}", WIDTH, subsequent_indent=" " * 11,
                    break_on_hyphens=False)  # fmt: skip
        left = LINES - len(last) - len(lines) - (len(phases) - place)  # after a line for each phase to come
        lines += told[: max(1, min(OF_A_PHASE, left))]
    return [line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in lines + last][:LINES]


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
    if found.unit == "bytes":
        return f"{found.value / 2**20:,.0f} MiB"
    if found.unit == "FLOP":
        return f"{found.value / 1e12:.4g} TFLOP"
    size = abs(found.value)
    text = f"{found.value:,.0f}" if size >= 1e3 or found.value == int(found.value) else f"{found.value:.4g}"
    return text if found.unit == "1" else f"{text} {found.unit}"

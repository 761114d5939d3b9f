"""The speed and memory that the shared-prefix teacher promises itself, judged from reports alone.

What a test decides, no target repeats: that a planted error in any path is caught, that a
layer which did not read its context is an error, and that a context is never truncated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.schema import Report, TeacherRow
from benchmarks.teacher_implementations import CONCAT, OURS_BUILT, OURS_REBUILT
from benchmarks.verdicts import CPU, HOPPER, Outcome, Verdict, reaches, verdicts, within, without_a_peer, without_a_run


@dataclass(frozen=True)
class TeacherTarget:
    """One promise.

    measure: "speed", concat's time over ours, at least `threshold`; "copies", the context's keys and values during a
    call over those of batch size 1, exactly `threshold` in every case; "seconds", the longest time of the check of
    first use, at most `threshold`; "attention", the modelled limit over the time of attention alone, at least
    `threshold`.
    """

    measure: str
    threshold: float
    devices: tuple[str, ...]
    implementation: str = OURS_BUILT
    model: str = ""
    sizes: tuple[int, int, int] | None = None  # context, response, batch

    @property
    def claim(self) -> str:
        if self.measure == "speed":
            kept = "kept" if self.implementation == OURS_BUILT else "rebuilt for each batch"
            return f"at least {self.threshold:g} times as fast as {CONCAT}, prefix {kept}"
        if self.measure == "copies":
            return "keys and values of the context are held exactly once, for any batch"
        if self.measure == "seconds":
            return f"the check at first use takes at most {self.threshold:g} s"
        return f"attention at {self.threshold:.0%} of its modelled limit or more"

    @property
    def shape(self) -> str:
        if self.sizes is None:
            return "every case" if self.measure == "copies" else ""
        context, response, batch = self.sizes
        return f"{self.model}, context {context:,}, {batch} answers of {response}"


_SMALL = {"model": "SmolLM2-135M", "sizes": (1024, 64, 16)}
_LARGE = {"model": "Qwen3-8B", "sizes": (8192, 512, 64)}
TARGETS = (
    TeacherTarget("speed", 12.0, HOPPER, OURS_BUILT, **_LARGE),  # type: ignore[arg-type]
    TeacherTarget("speed", 10.0, HOPPER, OURS_REBUILT, **_LARGE),  # type: ignore[arg-type]
    TeacherTarget("attention", 0.85, HOPPER, OURS_BUILT, **_LARGE),  # type: ignore[arg-type]
    TeacherTarget("copies", 1.0, HOPPER),
    TeacherTarget("speed", 8.0, CPU, OURS_BUILT, **_SMALL),  # type: ignore[arg-type]
    TeacherTarget("speed", 4.0, CPU, OURS_REBUILT, **_SMALL),  # type: ignore[arg-type]
    TeacherTarget("copies", 1.0, CPU),
    TeacherTarget("seconds", 1.0, CPU, "opcd_fast-auto"),
)


def judge(reports: Sequence[Report]) -> list[Verdict]:
    return verdicts(TARGETS, lambda target, report: _OUTCOMES[target.measure](target, report.teacher), reports)


def _speed(target: TeacherTarget, rows: Sequence[TeacherRow]) -> Outcome:
    found = {
        row.implementation: row
        for row in rows
        if (row.model, (row.context, row.response, row.batch), row.group) == (target.model, target.sizes, "main")
    }
    mine, other = found.get(target.implementation), found.get(CONCAT)
    missing = without_a_run(mine) or without_a_peer(other, CONCAT)
    if missing is not None:
        return missing
    why = f"{mine.implementation} {mine.time_ms.median:,.0f} ms, {CONCAT} {other.time_ms.median:,.0f} ms"
    return reaches(other.time_ms.median / mine.time_ms.median, target.threshold, why)


def _copies(target: TeacherTarget, rows: Sequence[TeacherRow]) -> Outcome:
    ours = [row for row in rows if row.implementation.startswith("opcd_fast") and row.prefix_bytes is not None]
    values = [row.prefix_bytes / row.one_prefix_bytes for row in ours if row.prefix_bytes and row.one_prefix_bytes]
    if not ours or len(values) < len(ours):
        return "unmeasured", None, "no row says what it held"
    worst = max(values, key=lambda value: abs(value - target.threshold))
    batches = ", ".join(str(batch) for batch in sorted({row.batch for row in ours}))
    return "met" if worst == target.threshold else "missed", worst, f"{len(ours)} rows, batches of {batches}"


def _seconds(target: TeacherTarget, rows: Sequence[TeacherRow]) -> Outcome:
    row = next((row for row in rows if row.group == "check" and row.implementation == target.implementation), None)
    if row is None or row.time_ms is None:
        return "unmeasured", None, "not in the report"
    return within(row.time_ms.max / 1e3, target.threshold, f"the longest of {row.time_ms.count}")


def _attention(target: TeacherTarget, rows: Sequence[TeacherRow]) -> Outcome:
    return "unmeasured", None, "the table times whole forwards, not attention alone"


_OUTCOMES = {"speed": _speed, "copies": _copies, "seconds": _seconds, "attention": _attention}

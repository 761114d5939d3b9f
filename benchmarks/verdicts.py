"""What a promise about speed, accuracy or memory comes to: "met", "missed" or "unmeasured", derived from reports alone.

Shared by targets.py (losses), teacher_targets.py and step_report.py; nobody types a verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.schema import Report

CPU = ("cpu",)  # the devices of a target: every CPU
HOPPER = ("H100", "H200")  # parts of the devices' names

Outcome = tuple[str, float | None, str]  # status, value and why of a `Verdict`


@dataclass(frozen=True)
class Verdict:
    target: Any  # has `devices`, `claim` and `shape`
    device: str
    status: str  # "met", "missed" or "unmeasured"
    value: float | None  # in the target's measure
    why: str  # what was compared, or what is missing


def verdicts(
    targets: Sequence[Any], outcome: Callable[[Any, Report], Outcome], reports: Sequence[Report]
) -> list[Verdict]:
    """One verdict per target and matching device; "unmeasured" where no device matches."""
    found = []
    for target in targets:
        matching = [report for report in reports if _matches(target.devices, report)]
        found += [Verdict(target, report.device.name, *outcome(target, report)) for report in matching]
        if not matching:
            wanted = "CPU" if target.devices == CPU else " or ".join(target.devices)
            found.append(Verdict(target, wanted, "unmeasured", None, "no report of such a device"))
    return found


def _matches(devices: Sequence[str], report: Report) -> bool:
    if report.device.kind == "cpu":
        return devices == CPU
    return any(name in report.device.name for name in devices)


def within(value: float, bound: float, why: str) -> Outcome:
    """Met if `value` is `bound` at most."""
    return "met" if value <= bound else "missed", value, why


def reaches(value: float, bound: float, why: str) -> Outcome:
    """Met if `value` is `bound` at least."""
    return "met" if value >= bound else "missed", value, why


def without_a_run(mine: Any, timed: bool = True) -> Outcome | None:
    """The outcome when our own row is missing, was skipped or failed, or should have a time and has none; else None."""
    if mine is None:
        return "unmeasured", None, "the case is not in the report"
    if mine.status == "skipped":
        return "unmeasured", None, f"{mine.implementation} skipped: {mine.note}"
    if mine.time_ms is None if timed else mine.status != "ok":
        return "missed", None, f"{mine.implementation} {mine.status}: {mine.note}"
    return None


def without_a_peer(other: Any, name: str) -> Outcome | None:
    """The outcome when what we are compared with has no time; None when it has."""
    if other is None:
        return "unmeasured", None, f"{name} not in the report"
    if other.time_ms is None:
        return "unmeasured", None, f"{name} {other.status}: {other.note}"
    return None


def markdown(found: Sequence[Verdict]) -> list[str]:
    lines = ["| target | case | device | | measured | from |", "|---|---|---|---|---|---|"]
    for v in found:
        value = ""
        if v.value is not None:
            value = f"{v.value:.2g}" if v.target.measure == "error" else f"{v.value:.2f}"
        lines.append(
            f"| {v.target.claim} | {v.target.shape} | {v.device} | {'**' + v.status + '**'} | {value} | {v.why} |"
        )
    return lines

"""The speed and accuracy that the losses promise themselves, judged from reports alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.schema import BOUND, OURS, Report, Row
from benchmarks.verdicts import CPU, HOPPER, Outcome, Verdict, reaches, verdicts, within, without_a_peer, without_a_run

ACCURACY = 3e-3
ACCURACY_RANGE = (3e-5, 1.0)  # mean KLs that the accuracy rows must reach, within 20 %


@dataclass(frozen=True)
class Target:
    """One promise about one shape.

    measure: "speed", `against`'s time over ours, at least `threshold`; "time", our time over `against`'s, at
    most `threshold`; "error", our largest gradient error in the accuracy group, at most `threshold`.
    """

    measure: str
    threshold: float
    against: str
    devices: tuple[str, ...]  # part of the device's name; ("cpu",) is every CPU
    V: int
    D: int
    dtype: str
    N: int | None = None  # None: any, for accuracy
    frozen: bool = False

    @property
    def claim(self) -> str:
        if self.measure == "error":
            return f"gradient error at most {self.threshold:g} at every mean KL from 1 to 3e-5"
        name = "the bare products" if self.against == BOUND else self.against
        if self.measure == "time":
            if self.threshold == 1:
                return f"no slower than {name}"
            return f"at most {self.threshold:g} of the time of {name}"
        return f"at least {self.threshold:.0%} of the speed of {name}" if self.against == BOUND else (
            f"at least {self.threshold:g} times as fast as {name}"
        )  # fmt: skip

    @property
    def shape(self) -> str:
        rows = "" if self.N is None else f"{self.N:,} × "
        return f"{rows}{self.V:,} × {self.D:,} {self.dtype}, {'frozen' if self.frozen else 'full'}"


def _gpu(measure: str, threshold: float, against: str, d: int, frozen: bool = False) -> Target:
    return Target(measure, threshold, against, HOPPER, 151_936, d, "bfloat16", 16_384, frozen)


def _cpu(measure: str, threshold: float, against: str, dtype: str) -> Target:
    return Target(measure, threshold, against, CPU, 49_152, 576, dtype, 512)


TARGETS = (
    _gpu("speed", 0.75, BOUND, 4096),
    _gpu("speed", 0.52, BOUND, 1024),
    _gpu("speed", 1.4, "trl", 4096),
    _gpu("speed", 1.4, "trl", 1024),
    _gpu("speed", 1.5, "trl", 4096, frozen=True),
    _gpu("speed", 1.5, "trl", 1024, frozen=True),
    _gpu("speed", 2.0, "liger-fused", 4096),
    _gpu("speed", 4.0, "liger-fused", 1024),
    Target("error", ACCURACY, "", HOPPER, 151_936, 1024, "bfloat16"),
    _cpu("time", 1.4, BOUND, "float32"),
    _cpu("time", 0.6, "trl", "float32"),
    _cpu("time", 0.3, "trl", "bfloat16"),
    _cpu("time", 1.0, "eager-bf16-logits", "bfloat16"),
    Target("error", ACCURACY, "", CPU, 49_152, 576, "bfloat16"),
)


def judge(reports: Sequence[Report]) -> list[Verdict]:
    return verdicts(TARGETS, _judge, reports)


def ours(rows: Sequence[Row]) -> Row | None:
    """Of one case's rows, the backend that "auto" would take."""
    found = {row.implementation: row for row in rows}
    return next((found[name] for name in OURS if name in found), None)


def _judge(target: Target, report: Report) -> Outcome:
    rows = [row for row in report.rows if _is_case(target, row)]
    mine = ours(rows)
    missing = without_a_run(mine, timed=target.measure != "error")
    if missing is not None:
        return missing
    if target.measure == "error":
        return _judge_error(mine, target)
    other = next((row for row in rows if row.implementation == target.against), None)
    missing = without_a_peer(other, target.against)
    if missing is not None:
        return missing
    ratio = mine.time_ms.median / other.time_ms.median
    names = mine.implementation, _versioned(report, other)
    why = f"{names[0]} {mine.time_ms.median:,.1f} ms, {names[1]} {other.time_ms.median:,.1f} ms"
    if target.measure == "time":
        return within(ratio, target.threshold, why)
    return reaches(1 / ratio, target.threshold, why)


def _judge_error(mine: Row, target: Target) -> Outcome:
    found = mine.gradient_error
    low, high = ACCURACY_RANGE
    if not found or min(e.mean_kl for e in found) > 1.2 * low or max(e.mean_kl for e in found) < 0.8 * high:
        return "unmeasured", None, f"{mine.implementation} has no errors over that range"
    if any(e.relative_error is None for e in found):
        return "missed", None, f"{mine.implementation}: a gradient held NaN or infinities"
    value = max(e.relative_error for e in found if e.relative_error is not None)
    of = sorted({e.of for e in found})
    why = f"{mine.implementation}, gradient of the {' and the '.join(of)}, {len(found)} comparisons"
    return within(value, target.threshold, why)


def _is_case(target: Target, row: Row) -> bool:
    group = "accuracy" if target.measure == "error" else "main"
    same = (row.V, row.D, row.dtype, row.frozen) == (target.V, target.D, target.dtype, target.frozen)
    return row.group == group and same and target.N in (None, row.N)


def _versioned(report: Report, row: Row) -> str:
    package = {"trl": "trl", "liger-fused": "liger-kernel", "liger-chunked": "liger-kernel"}.get(row.implementation)
    return f"{row.implementation} {report.versions.get(package)}" if package else row.implementation

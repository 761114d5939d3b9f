"""The part of docs/performance.md on whole training steps: targets and tables, from reports alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import targets
from benchmarks.schema import Report, StepRow
from benchmarks.targets import Verdict
from benchmarks.teacher_report import Found

OURS, PEER = "opcd_fast", "trl-sdft"
_HOPPER = ("H100", "H200")


@dataclass(frozen=True)
class StepTarget:
    """One promise about a case. measure: "time", our time of a step over the peer's, at most `threshold`; "rate",
    answer tokens per second over the peer's, at least `threshold`; "memory", peak over the peer's, at most."""

    measure: str
    threshold: float
    devices: tuple[str, ...]
    case: str

    @property
    def claim(self) -> str:
        return {
            "time": f"a step takes at most {self.threshold:.2g} of {PEER}'s time",
            "rate": f"at least {self.threshold:g} times {PEER}'s scored and trained tokens per second",
            "memory": f"at most {self.threshold:.2g} of {PEER}'s peak memory",
        }[self.measure]

    @property
    def shape(self) -> str:
        return self.case


TARGETS = (
    StepTarget("time", 0.5, ("cpu",), "demo-bf16-checkpointed"),
    StepTarget("rate", 3.0, _HOPPER, "1.7b-4k-64x512-checkpointed"),
    StepTarget("memory", 1 / 3, _HOPPER, "1.7b-4k-64x512-checkpointed"),
)


def judge(reports: Sequence[Report]) -> list[Verdict]:
    """One verdict per target and matching device; "unmeasured" where no device matches."""
    verdicts = []
    for target in TARGETS:
        matching = [r for r in reports if _matches(target, r)]
        verdicts += [Verdict(target, r.device.name, *_judge(target, r.steps)) for r in matching]
        if not matching:
            wanted = "CPU" if target.devices == ("cpu",) else " or ".join(target.devices)
            verdicts.append(Verdict(target, wanted, "unmeasured", None, "no report of such a device"))
    return verdicts


def _matches(target: StepTarget, report: Report) -> bool:
    if report.device.kind == "cpu":
        return target.devices == ("cpu",)
    return any(name in report.device.name for name in target.devices)


def _judge(target: StepTarget, rows: Sequence[StepRow]) -> tuple[str, float | None, str]:
    found = {row.implementation: row for row in rows if row.case == target.case}
    mine, other = found.get(OURS), found.get(PEER)
    if mine is None or mine.status == "skipped":
        return "unmeasured", None, "the case is not in the report" if mine is None else f"skipped: {mine.note}"
    if mine.time_ms is None:
        return "missed", None, f"{OURS} {mine.status}: {mine.note}"
    if other is None or other.time_ms is None:
        reason = "not in the report" if other is None else f"{other.status}: {other.note}"
        return "unmeasured", None, f"{PEER} {reason}"
    if target.measure == "memory":
        if not mine.peak_bytes or not other.peak_bytes:
            return "unmeasured", None, "a peak is missing"
        value = mine.peak_bytes / other.peak_bytes
        why = f"{mine.peak_bytes / 2**20:,.0f} MiB, {PEER} {other.peak_bytes / 2**20:,.0f} MiB"
        return "met" if value <= target.threshold else "missed", value, why
    why = f"{mine.time_ms.median / 1e3:.2f} s, {PEER} {other.time_ms.median / 1e3:.2f} s"
    value = mine.time_ms.median / other.time_ms.median
    if target.measure == "time":
        return "met" if value <= target.threshold else "missed", value, why
    value = (mine.answer_tokens or 0.0) / (other.answer_tokens or 1.0) / value
    return "met" if value >= target.threshold else "missed", value, why


def section(found: Found, head: Callable[[str, Report], list[str]]) -> list[str]:
    """Markdown. `head` says where a report comes from."""
    lines = [
        "## Whole training steps",
        "",
        "One optimizer step: fresh answers, both models' forwards, loss, backward, update. `trl-sdft` is TRL's "
        "SDFTTrainer with the full vocabulary, the reverse KL and the base model as the teacher, the context in every "
        "teacher prompt. Peak: of a run, above what was held once the model was loaded. "
        "[What is compared](../benchmarks/README.md#whole-training-steps).",
        "",
        "### Targets of a step",
        "",
        *targets.markdown(judge([report for _, report in found])),
        "",
    ]
    if not found:
        lines += ["No results file holds a run of `python -m benchmarks.step_table`.", ""]
    for name, report in found:
        lines += [f"### Steps on {report.device.name}", "", *head(name, report)]
        for case in dict.fromkeys(row.case for row in report.steps):
            rows = [row for row in report.steps if row.case == case]
            lines += [f"#### {title(rows[0])}", "", *table(rows), ""]
    return lines


def title(row: StepRow) -> str:
    checkpointed = "checkpointed" if row.checkpointing else "not checkpointed"
    return (
        f"{row.model}, context {row.context:,}, {row.prompts} answers of at most {row.tokens}, {row.dtype}, "
        f"{checkpointed}"
    )


def table(rows: Sequence[StepRow]) -> list[str]:
    lines = [
        f"| trainer | s a step (min to max) | of {PEER} | answer tokens a step | tokens/s | peak MiB | parts, s |",
        "|---|---|---|---|---|---|---|",
    ]
    peer = next((row.time_ms for row in rows if row.implementation == PEER), None)
    for row in rows:
        if row.time_ms is None:
            lines.append(f"| {row.implementation} | | | | | | {row.status}: {row.note} |")
            continue
        t = row.time_ms
        tokens = row.answer_tokens or 0.0
        cells = [
            row.implementation,
            f"{t.median / 1e3:.2f} ({t.min / 1e3:.2f} to {t.max / 1e3:.2f}, {t.count} steps)",
            "" if peer is None else f"{t.median / peer.median:.2f}",
            f"{tokens:.0f}",
            f"{1e3 * tokens / t.median:.1f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
            ", ".join(f"{part} {ms / 1e3:.2f}" for part, ms in row.parts_ms.items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines

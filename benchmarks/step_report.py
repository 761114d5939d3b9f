"""The part of docs/performance.md on whole training steps: targets and tables, from reports alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.schema import Report, StepRow
from benchmarks.teacher_report import Found
from benchmarks.verdicts import (
    CPU,
    HOPPER,
    Outcome,
    Verdict,
    markdown,
    reaches,
    verdicts,
    within,
    without_a_peer,
    without_a_run,
)

OURS, PEER = "opcd_fast", "trl-sdft"


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
    StepTarget("time", 0.5, CPU, "demo-bf16-checkpointed"),
    StepTarget("rate", 3.0, HOPPER, "1.7b-4k-64x512-checkpointed"),
    StepTarget("memory", 1 / 3, HOPPER, "1.7b-4k-64x512-checkpointed"),
)


def judge(reports: Sequence[Report]) -> list[Verdict]:
    return verdicts(TARGETS, lambda target, report: _judge(target, report.steps), reports)


def _judge(target: StepTarget, rows: Sequence[StepRow]) -> Outcome:
    found = {row.implementation: row for row in rows if row.case == target.case}
    mine, other = found.get(OURS), found.get(PEER)
    missing = without_a_run(mine) or without_a_peer(other, PEER)
    if missing is not None:
        return missing
    if target.measure == "memory":
        if not mine.peak_bytes or not other.peak_bytes:
            return "unmeasured", None, "a peak is missing"
        why = f"{mine.peak_bytes / 2**20:,.0f} MiB, {PEER} {other.peak_bytes / 2**20:,.0f} MiB"
        return within(mine.peak_bytes / other.peak_bytes, target.threshold, why)
    why = f"{mine.time_ms.median / 1e3:.2f} s, {PEER} {other.time_ms.median / 1e3:.2f} s"
    ratio = mine.time_ms.median / other.time_ms.median
    if target.measure == "time":
        return within(ratio, target.threshold, why)
    return reaches((mine.answer_tokens or 0.0) / (other.answer_tokens or 1.0) / ratio, target.threshold, why)


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
        *markdown(judge([report for _, report in found])),
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

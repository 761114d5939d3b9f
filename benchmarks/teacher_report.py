"""The teacher's part of docs/performance.md: targets, tables, plots and the arithmetic model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import teacher_model, teacher_targets, verdicts
from benchmarks.schema import BOUND, Report, TeacherRow
from benchmarks.teacher_implementations import CONCAT

Found = Sequence[tuple[str, Report]]  # (file name, report), the newest of each device


def section(
    found: Found, folder: Path, head: Callable[[str, Report], list[str]], slug: Callable[[Report], str]
) -> list[str]:
    """Markdown; the plots are written to `folder`/images. `head` says where a report comes from, `slug` names its
    device in a file's name."""
    lines = [
        "## The shared-prefix teacher",
        "",
        "One call gives the hidden states of a batch of answers after one context. Speed-up: over `concat`, plain "
        "transformers reading context and answer together. Of limit: the least time for what that row must compute, at "
        "the rate of bare matrix products in the same run, over its time. KV: keys and values of the context in all "
        "layers, in copies. Max |Δh|: against float32, each answer alone. "
        "[What is compared](../benchmarks/README.md#the-teacher).",
        "",
        "### Targets of the teacher",
        "",
        *verdicts.markdown(teacher_targets.judge([report for _, report in found])),
        "",
    ]
    if not found:
        lines += [
            "No results file holds a run of `python -m benchmarks.teacher_table`; the numbers below are arithmetic.",
            "",
        ]
    for name, report in found:
        lines += [f"### The teacher on {report.device.name}", "", *head(name, report)]
        for rows in _by_case(report.teacher):
            lines += [f"#### {title(rows[0])}", "", *table(rows), ""]
        lines += _plots(report, name, folder, slug(report))
    return [*lines, "### What sharing can save", "", *teacher_model.markdown(), ""]


def title(row: TeacherRow) -> str:
    if row.group == "check":
        return f"First use, {row.model}, {row.dtype}"
    flex = ", beside flex attention" if row.group == "flex" else ""
    answers = f"{row.batch} answers of {row.response:,}"
    return f"Context {row.context:,}, {answers}, {row.model}, {row.dtype}{flex}"


def table(rows: Sequence[TeacherRow]) -> list[str]:
    lines = [
        "| implementation | ms (min to max) | speed-up | of limit | peak MiB | KV | max \\|Δh\\| | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    concat = next((row for row in rows if row.implementation == CONCAT), None)
    for row in rows:
        if row.time_ms is None:
            lines.append(f"| {row.implementation} | | | | | | | {row.status}: {row.note} |")
            continue
        t = row.time_ms
        times = _ms(t.median) + (f" ({_ms(t.min)} to {_ms(t.max)})" if t.count > 1 else " (one call)")
        gain = speedup(row, concat)
        cells = [
            row.implementation,
            times,
            "" if gain is None else f"{gain:.1f}×",
            "" if row.limit_ms is None else f"{row.limit_ms / t.median:.0%}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
            _copies(row),
            "" if row.max_error is None else f"{row.max_error:.1e}",
            "; ".join(filter(None, [_at_once(row), row.note])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speedup(row: TeacherRow, concat: TeacherRow | None) -> float | None:
    """concat's median time over this row's."""
    if concat is None or concat.time_ms is None or row.time_ms is None or row.implementation == BOUND:
        return None
    return concat.time_ms.median / row.time_ms.median


def modelled(row: TeacherRow, concat: TeacherRow | None) -> float | None:
    """The same if every FLOP cost the same: no measurement."""
    if concat is None or not concat.flops or not row.flops:
        return None
    return concat.flops / row.flops


def _copies(row: TeacherRow) -> str:
    if row.prefix_bytes is None or not row.one_prefix_bytes:
        return ""
    if not row.prefix_bytes:
        return "not kept"
    return f"{row.prefix_bytes / row.one_prefix_bytes:.4g}× ({row.prefix_bytes / 2**20:,.1f} MiB)"


def _at_once(row: TeacherRow) -> str:
    if row.sequences_at_once is None or row.sequences_at_once == row.batch:
        return ""
    return f"{row.sequences_at_once} answers at a time"


def _by_case(rows: Sequence[TeacherRow]) -> list[list[TeacherRow]]:
    cases: dict[str, list[TeacherRow]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return list(cases.values())


def _plots(report: Report, name: str, folder: Path, slug: str) -> list[str]:
    from benchmarks import teacher_plots

    lines = []
    for caption, path in teacher_plots.draw(report, folder / "images", f"teacher_{slug}"):
        lines += [
            f"![{caption}]({path.relative_to(folder).as_posix()})",
            "",
            f"{caption}: {report.device.name}, {report.date[:10]}, torch {report.versions.get('torch')}, "
            f"`{report.command}` ({name}).",
            "",
        ]
    return lines


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"

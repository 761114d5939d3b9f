"""The page's section about GPUs, from whatever lines came back from `scripts/gpu.sh`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.phases import RUNS
from benchmarks.gpu.summary import number
from benchmarks.phase_rows import Head, PhaseRow, Run, read

FOLDER = "gpu"  # in the results
ABOUT = {phase.name: phase.about for phases in RUNS.values() for phase in phases}


def runs(results: Path) -> list[tuple[str, Run]]:
    """(file name, run), newest first. Raises ValueError for a file that is not of the schema."""
    return [(path.name, read(path)) for path in sorted((results / FOLDER).glob("*.jsonl"), reverse=True)]


def section(found: Sequence[tuple[str, Run]]) -> list[str]:
    lines = ["## GPU runs", ""]
    if not found:
        return [*lines, "Not measured on a GPU: `scripts/gpu.sh` has not run on one yet.", ""]
    lines += ["What `scripts/gpu.sh` measured, phase by phase; of each phase what it got to.", ""]
    for name, run in found:
        lines += _run(name, run)
    return lines


def _run(name: str, run: Run) -> list[str]:
    lines = [f"### {name.removesuffix('.jsonl')}", ""]
    if run.damaged:
        lines += [f"Cut off in the file: line {', '.join(map(str, run.damaged))}.", ""]
    ends = run.ends()
    phases = list(dict.fromkeys([*run.heads, *ends, *(row.phase for row in run.rows)]))
    for phase in phases:
        lines += [f"#### {phase}: {ABOUT.get(phase, 'a phase of another version')}", ""]
        lines += [*_head(run.heads.get(phase)), *_end(ends.get(phase)), *_table(run.of(phase))]
    return lines


def _head(head: Head | None) -> list[str]:
    if head is None:
        return ["It left no head: its process did not get that far.", ""]
    facts = [f"`{head.command}`", head.date, head.device.name, f"commit {head.git_commit or 'unknown'}"]
    if head.git_dirty:
        facts.append("**with uncommitted changes**")
    facts += [f"driver {head.device.driver}"] if head.device.driver else []
    facts += [f"{package} {version}" for package, version in head.versions.items() if version]
    facts += [f"`{name}={text}`" for name, text in head.environment.items()]
    return ["; ".join(facts) + ".", ""]


def _end(end: PhaseRow | None) -> list[str]:
    if end is None:
        return ["**Not finished**: the run ended before it.", ""]
    if end.status == "ok":
        return []
    return [f"**{end.status}** after {end.seconds:.0f} s: {_plain(end.reason)}", ""]


def _table(rows: Sequence[PhaseRow]) -> list[str]:
    if not rows:
        return ["No rows.", ""]
    lines = ["| what | shape | values |", "|---|---|---|"]
    passed = [row for row in rows if row.status == "ok" and "::" in row.name]
    for row in rows:
        if row in passed:
            continue  # tests: their number says enough
        shape = ", ".join(f"{name} {size:,}" for name, size in row.shape.items())
        settings = ", ".join(f"{name} {_plain(text)}" for name, text in row.settings.items())
        values = ", ".join(f"{_plain(name)} {number(found)}" for name, found in row.values.items())
        if row.status != "ok":
            values = ". ".join(filter(None, [f"**{row.status}**: {_plain(row.reason)}", values]))
        lines.append(f"| {_plain(row.name)} | {'; '.join(filter(None, [shape, settings]))} | {values} |")
    if passed:
        lines.append(f"| {len(passed)} tests | | passed |")
    return [*lines, ""]


def _plain(text: str | None) -> str:
    """In one cell of a table."""
    return " ".join((text or "").replace("|", "\\|").replace("<", "&lt;").split())

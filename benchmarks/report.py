"""`python -m benchmarks.report [--results DIR] [--out docs/performance.md]`: the measured numbers as a page.

Reads every JSON file of the results folder and renders, for each device, the newest report of the loss table, of the
teacher's and of that of training steps: the targets and whether they are met, tables, plots (in images/ beside the
page), and what arithmetic says of the first two. Only the loss's table must be there. The same files give the same
page. A file that is half-written, of another schema, or of a run that was stopped is an error, not something to skip:
numbers that nobody noticed missing are worse than none.

The JSON lines of `scripts/gpu.sh`, in the results' folder gpu/, are another matter: a lease ends when it ends, and the
page says what is missing.

Exit status: 0, or 2 with the reason on stderr.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import gpu_report, roofline, step_report, targets, teacher_report, verdicts
from benchmarks.phase_rows import Run
from benchmarks.schema import BOUND, GradientError, Report, Row, read

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = {"N": "Rows", "D": "Width", "V": "Vocabulary", "workspace": "Chunk size (`workspace_bytes`)"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md", help="page to write")
    options = parser.parse_args(arguments)
    try:
        found = newest(options.results)
        teacher = newest(options.results, "teacher")
        steps = newest(options.results, "step")
        on_gpus = gpu_report.runs(options.results)
        text = page(found, teacher, options.out.parent, steps, on_gpus)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"benchmarks.report: the plots need {error.name}: pip install {error.name}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"{options.out}: {', '.join(name for name, _ in [*found, *teacher, *steps, *on_gpus])}")
    return 0


def newest(folder: Path, benchmark: str = "loss") -> list[tuple[str, Report]]:
    """(file name, report) of the newest table "loss", "teacher" or "step" of each device, GPUs first.

    Raises ValueError for any JSON file there that is not a complete report, whatever its benchmark, and when there is
    no loss table.
    """
    by_device: dict[tuple[str, str], tuple[str, Report]] = {}
    for path in sorted(folder.glob("*.json")):
        report = read(path)
        if not report.complete:
            raise ValueError(
                f"{path.name} is not complete: its run was stopped. Run it again, or move the file out of {folder}"
            )
        device = (report.device.kind, report.device.name)
        if report.benchmark == benchmark and (device not in by_device or by_device[device][1].date < report.date):
            by_device[device] = (path.name, report)
    if not by_device and benchmark == "loss":
        raise ValueError(f"no report of the loss table in {folder}; make one with python -m benchmarks.loss_table")
    return [by_device[device] for device in sorted(by_device, key=lambda key: (key[0] != "cuda", key[1]))]


def page(
    found: teacher_report.Found,
    teacher: teacher_report.Found,
    folder: Path,
    steps: teacher_report.Found = (),
    on_gpus: Sequence[tuple[str, Run]] = (),
) -> str:
    """The page's Markdown; the plots are written to `folder`/images."""
    lines = [
        "# Performance",
        "",
        "Written by `python -m benchmarks.report` from the files named below; do not edit. First "
        "the loss, then [the teacher](#the-shared-prefix-teacher), [whole steps](#whole-training-steps) and [what one "
        "lease of a GPU gave](#gpu-runs). "
        "[How it is measured](../benchmarks/README.md).",
        "",
    ]
    measured = [report.device.kind for _, report in [*found, *teacher, *steps]]
    measured += [head.device.kind for _, run in on_gpus for head in run.heads.values()]
    if "cuda" not in measured:
        lines += ["**Nothing here was measured on a GPU.**", ""]
    lines += ["## Targets", ""]
    lines += ["One call of the loss is forward and backward of the mean reverse KL over N rows.", ""]
    lines += verdicts.markdown(targets.judge([report for _, report in found]))
    for name, report in found:
        lines += ["", f"## {report.device.name}", "", *_head(name, report), *_device_tables(report)]
        lines += _plots(report, name, folder)
    lines += ["", "## Roofline", "", *roofline.markdown(), ""]
    lines += teacher_report.section(teacher, folder, _head, _slug)
    lines += [*step_report.section(steps, _head), *gpu_report.section(on_gpus)]
    return "\n".join(lines)


def _slug(report: Report) -> str:
    """The device in the name of a plot's file."""
    device = "cpu" if report.device.kind == "cpu" else report.device.name
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _head(name: str, report: Report) -> list[str]:
    device = report.device
    facts = [f"`{report.command}`", report.date, f"commit {report.git_commit or 'unknown'}"]
    if report.git_dirty:
        facts.append("**with uncommitted changes**")
    if report.git_dirty is None and report.git_commit:
        facts.append("given to the run by name, its state unknown")
    if device.kind == "cuda":
        facts += [f"driver {device.driver}", f"CUDA {device.cuda}"]
        if device.matmul_flops_per_second and device.copy_bytes_per_second:
            facts.append(
                f"a large bf16 product {device.matmul_flops_per_second / 1e12:.0f} TFLOP/s, "
                f"a large copy {device.copy_bytes_per_second / 1e12:.2f} TB/s"
            )
    else:
        facts.append(f"{device.count_of_processors} threads")
    facts += [f"{package} {version}" for package, version in report.versions.items() if version]
    lines = [f"[{name}](../benchmarks/results/{name}): " + "; ".join(facts) + ".", ""]
    for note in report.notes:
        lines += [f"> {note}", ""]
    return lines


def _device_tables(report: Report) -> list[str]:
    lines = []
    if any(row.bound_fraction and row.bound_fraction > 1 for row in report.rows):
        lines += [
            "Above 100 %: the bare products run in the inputs' dtype, which need not be the fastest one here.",
            "",
        ]
    for rows in _by_case(row for row in report.rows if row.group == "main"):
        lines += [f"### {_case_title(rows[0])}", "", *_case_table(rows), ""]
    errors = [row for row in report.rows if row.group == "accuracy"]
    for rows in _by_case(errors):
        lines += [f"### Gradient error, {_case_title(rows[0])}", "", *_error_table(rows), ""]
    for group, title in SWEEPS.items():
        rows = [row for row in report.rows if row.group == group]
        if rows:
            lines += [f"### {title}", "", *_sweep_table(rows), ""]
    return lines


def _case_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| implementation | ms (min to max) | of bound | peak MiB | error of dL/dh | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.time_ms is None:
            lines.append(f"| {row.implementation} | | | | | {row.status}: {row.note} |")
            continue
        t = row.time_ms
        errors = ", ".join(f"{_error(e)} at KL {e.mean_kl:.1e}" for e in row.gradient_error if e.of == "hidden")
        lines.append(
            f"| {row.implementation} | {_ms(t.median)} ({_ms(t.min)} to {_ms(t.max)}) | {_percent(row)} | "
            f"{_peak(row)} | {errors} | {'' if row.exact else 'inexact'} |"
        )
    return lines


def _error_table(rows: Sequence[Row]) -> list[str]:
    """One line per implementation and gradient, one column per mean KL."""
    kls = sorted({e.mean_kl for row in rows for e in row.gradient_error}, reverse=True)
    if not kls:
        return [f"{row.implementation}: {row.status}, {row.note}.  " for row in rows]
    lines = [
        "| implementation | of | " + " | ".join(f"KL {kl:.1e}" for kl in kls) + " | |",
        "|---" * (len(kls) + 3) + "|",
    ]
    for row in rows:
        if row.status != "ok":
            lines.append(f"| {row.implementation} | |" + " |" * len(kls) + f" {row.status}: {row.note} |")
            continue
        for of, label in (("hidden", "dL/dh"), ("weight", "dL/dW")):
            found = {e.mean_kl: e for e in row.gradient_error if e.of == of}
            if found:
                cells = " | ".join(_error(found[kl]) if kl in found else "" for kl in kls)
                lines.append(f"| {row.implementation} | {label} | {cells} | {'' if row.exact else 'inexact'} |")
    return lines


def _sweep_table(rows: Sequence[Row]) -> list[str]:
    """One line per case; of each implementation the time and its share of the bound."""
    names = list(dict.fromkeys(row.implementation for row in rows))
    lines = ["| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for case in _by_case(rows):
        found = {row.implementation: row for row in case}
        workspace = next((row.workspace_bytes for row in case if row.workspace_bytes), None)
        title = _case_title(case[0]) + (f", {workspace / 2**20:,.0f} MiB" if workspace else "")
        lines.append(f"| {title} | " + " | ".join(_sweep_cell(found.get(name)) for name in names) + " |")
    return lines


def _sweep_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.time_ms is None:
        return row.status
    if row.implementation == BOUND:
        return f"{_ms(row.time_ms.median)} ms"
    peak = "" if row.peak_bytes is None else f", {_peak(row)} MiB"
    return f"{_ms(row.time_ms.median)} ms, {_percent(row)}{peak}"


def _plots(report: Report, name: str, folder: Path) -> list[str]:
    from benchmarks import plots

    lines = []
    for title, path in plots.draw(report, folder / "images", f"loss_{_slug(report)}"):
        lines += [
            f"![{title}]({path.relative_to(folder).as_posix()})",
            "",
            f"{title}: {report.device.name}, {report.date[:10]}, torch {report.versions.get('torch')}, "
            f"`{report.command}` ({name}).",
            "",
        ]
    return ["### Plots", "", *lines] if lines else []


def _by_case(rows: Iterable[Row]) -> list[list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return list(cases.values())


def _case_title(row: Row) -> str:
    return f"N {row.N:,}, V {row.V:,}, D {row.D:,}, {row.dtype}, {'frozen' if row.frozen else 'full'}"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"


def _percent(row: Row) -> str:
    return "" if row.bound_fraction is None else f"{row.bound_fraction:.0%}"


def _peak(row: Row) -> str:
    return "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"


def _error(error: GradientError) -> str:
    return "NaN" if error.relative_error is None else f"{error.relative_error:.1e}"


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.report [--results DIR] [--out docs/performance.md]`: the measured numbers as a page.

Reads every file of the results folder and renders, for each device, the newest run of the tables loss, teacher, step
and decoding: the targets and whether they are met, what was measured, and plots (in images/ beside the page). All
tables are made in the same way: a line for each row, a column for each value that most of them have.
A file that is half-written, of another schema, or of a run that was stopped is an error, not something to skip: numbers
that nobody noticed missing are worse than none.

The files of `scripts/gpu.sh`, in the results' folder gpu/, are another matter: a lease ends when it ends, and the page
says what is missing.

Exit status: 0, or 2 with the reason on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots, targets, teacher_model
from benchmarks.gpu.phases import RUNS
from benchmarks.gpu.summary import number
from benchmarks.schema import BOUND, END, Head, Row, Run, Value, by_case, read, value

ROOT = Path(__file__).resolve().parent.parent
AGAINST = {"loss": BOUND, "teacher": "concat", "step": "trl-sdft"}  # in every case that is timed
Runs = list[tuple[str, Head, list[Row]]]  # (file, head, rows)
TITLES = {"loss": "Targets", "teacher": "The shared-prefix teacher", "step": "Whole training steps",
          "decoding": "Decoding"}  # fmt: skip
ON_GPU = {"loss": ("loss", "accuracy"), "decoding": ("decoding",), "step": ("consumer",)}  # phases with targets
ABOUT = {
    "loss": "One call of the loss is forward and backward of the mean reverse KL over N rows. `dL/dh`, `dL/dW`: "
    "relative errors against float64 at that mean KL. [What is compared](../benchmarks/README.md#what-is-compared).",
    "teacher": "One call gives the hidden states of a batch of answers after one context. `of concat`: the time over "
    "that of plain transformers reading context and answer together. "
    "[What is compared](../benchmarks/README.md#the-teacher).",
    "step": "One optimizer step: fresh answers, both models' forwards, loss, backward, update. `trl-sdft` is TRL's "
    "SDFTTrainer with the full vocabulary and the reverse KL, `of trl-sdft` the time over its. "
    "[What is compared](../benchmarks/README.md#whole-training-steps).",
    "decoding": "Answers to the same prompts, all as long as the limit: our loop, transformers' `generate`, and vLLM "
    "where it is installed. `calls`: operators per token of a batch of two that the host issues, `waits`: how often it "
    "waits for the device; what a graph replays is none. [How](../docs/rollouts.md#in-this-process).",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md", help="page to write")
    options = parser.parse_args(arguments)
    try:
        found = newest(options.results)
        text = page(found, gpu_runs(options.results))
        for runs in found.values():
            for _, head, rows in runs:
                plots.draw(plots.of(head, rows), options.out.parent / "images")
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"benchmarks.report: the plots need {error.name}: pip install {error.name}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"{options.out}: {', '.join(name for runs in found.values() for name, _, _ in runs)}")
    return 0


def newest(folder: Path) -> dict[str, Runs]:
    """Of each table the newest run of each device, GPUs first.

    Raises ValueError for any file there that is not a whole run, whatever its table, and when there is no loss table.
    """
    found: dict[str, dict[tuple[bool, str], tuple[str, Head, list[Row]]]] = {table: {} for table in TITLES}
    for path in sorted(folder.glob("*.jsonl")):
        run = read(path)
        if run.damaged or len(run.heads) != 1 or run.heads.keys() != run.ends().keys():
            raise ValueError(
                f"{path.name} is not one whole table: its run was stopped. Run it again, or move it out of {folder}"
            )
        ((table, head),) = run.heads.items()
        _refuse_gaps(path.name, table, run.of(table))
        runs, key = found.setdefault(table, {}), (head.device.kind != "cuda", head.device.name)
        if key not in runs or runs[key][1].date < head.date:
            runs[key] = (path.name, head, run.of(table))
    if not found["loss"]:
        raise ValueError(f"no run of the loss table in {folder}; make one with python -m benchmarks loss")
    return {table: [runs[key] for key in sorted(runs)] for table, runs in found.items()}


def _refuse_gaps(file: str, table: str, rows: Sequence[Row]) -> None:
    """Raises ValueError where a case or a number that others are compared with is missing."""
    for case in by_case(rows):
        against = AGAINST.get(table)
        if against and case[0].group not in ("accuracy", "check") and against not in {r.implementation for r in case}:
            raise ValueError(f"{file}: {case[0].case} has no row of {against}, with which the others are compared")
    for row in rows:
        wanted = ("dL/dh", "mean_kl") if row.group == "accuracy" else ("time",)
        missing = [name for name in wanted if row.get(name) is None]
        if row.status == "ok" and missing:
            raise ValueError(f"{file}: {row.name} has no {missing[0]} although its status is 'ok'")


def gpu_runs(results: Path) -> list[tuple[str, Run]]:
    """(file name, run) of `scripts/gpu.sh`, newest first. Raises ValueError for a file that is not of the schema."""
    return [(path.name, read(path)) for path in sorted((results / "gpu").glob("*.jsonl"), reverse=True)]


def page(found: dict[str, Runs], on_gpus: Sequence[tuple[str, Run]] = ()) -> str:
    """The page's Markdown."""
    lines = [
        "# Performance",
        "",
        "Written by `python -m benchmarks.report` from the files named below; do not edit. First "
        "the loss, then [the teacher](#the-shared-prefix-teacher), [whole steps](#whole-training-steps), "
        "[decoding](#decoding) and [what one lease of a GPU gave](#gpu-runs). "
        "[How it is measured, and what the columns are](../benchmarks/README.md).",
        "",
    ]
    heads = [head for runs in found.values() for _, head, _ in runs]
    heads += [head for _, run in on_gpus for head in run.heads.values()]
    if all(head.device.kind == "cpu" for head in heads):
        lines += ["**Nothing here was measured on a GPU.**", ""]
    for table, title in TITLES.items():
        lines += [f"## {title}", "", ABOUT[table], ""]
        judged = [(head, rows) for _, head, rows in found[table]]
        for _, run in on_gpus:
            if phases := [phase for phase in ON_GPU.get(table, ()) if phase in run.heads]:
                judged.append((run.heads[phases[0]], [row for phase in phases for row in run.of(phase)]))
        lines += [*targets.markdown(table, judged), ""]
        if not found[table]:
            lines += [f"No results file holds a run of `python -m benchmarks {table}`.", ""]
        for file, head, rows in found[table]:
            lines += [f"### {table} on {head.device.name}", "", *_head(head, file)]
            lines += tables(rows, AGAINST.get(table, BOUND))
            for plot in plots.of(head, rows):
                lines += [f"![{plot.title}](images/{plot.file})", "", f"{plot.title} ({file}).", ""]
        if table == "teacher":
            lines += ["### What sharing can save", "", *teacher_model.markdown(), ""]
    return "\n".join([*lines, *_gpu_section(on_gpus)])


def _head(head: Head, file: str = "") -> list[str]:
    """Where rows come from."""
    device = head.device
    facts = [f"`{head.command}`", head.date, *([] if file else [device.name]), f"commit {head.git_commit or 'unknown'}"]
    if head.git_dirty:
        facts.append("**with uncommitted changes**")
    if head.git_dirty is None and head.git_commit:
        facts.append("given to the run by name, its state unknown")
    if device.kind == "cpu":
        facts.append(f"{device.count_of_processors} threads")
    facts += [f"driver {device.driver}"] if device.driver else []
    facts += [f"CUDA {device.cuda}"] if device.cuda else []
    facts += [f"{package} {version}" for package, version in head.versions.items() if version]
    facts += [f"`{name}={text}`" for name, text in head.environment.items()]
    lines = [(f"[{file}](../benchmarks/results/{file}): " if file else "") + "; ".join(facts) + ".", ""]
    return lines + [line for note in head.notes for line in (f"> {note}", "")]


# --- tables --------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row], against: str = BOUND) -> list[str]:
    """A table for each group of cases. against: an implementation with whose time the others' are compared."""
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        lines += [f"#### {group}", ""] if group else []
        lines += [*_table([row for row in rows if row.group == group], against), ""]
    return lines


def _table(rows: Sequence[Row], against: str) -> list[str]:
    """A line for each row, of tests that passed one for all; a column for each value that half of the rows have, and
    the last one for the rest."""
    passed = [row for row in rows if row.status == "ok" and "::" in row.case]
    shown = [(row, _values(row, rows, against)) for row in rows if row not in passed and row.case != END]
    names = Counter(name for _, values in shown for name in values)
    measured = sum(bool(values) for _, values in shown)
    columns = [name for name, count in names.items() if 2 * count >= measured]
    lines = [f"| case | implementation | {' | '.join([*columns, ''])} |", "|---" * (3 + len(columns)) + "|"]
    before = None
    for row, values in shown:
        case = "" if row.case == before else "; ".join(filter(None, [_plain(row.case), _sizes(row)]))
        cells = [_cell(values.get(name)) for name in columns]
        rest = [f"{_plain(name)} {_cell(found)}" for name, found in values.items() if name not in columns]
        status = f"**{row.status}**: {_plain(row.note)}" if row.status != "ok" else _plain(row.note)
        notes = "; ".join(filter(None, [row.settings.get("gradient"), status, ", ".join(rest)]))
        lines.append(f"| {' | '.join([case, row.implementation, *cells, notes])} |")
        before = row.case
    return [*lines, f"| {len(passed)} tests passed |" + " |" * (2 + len(columns))] if passed else lines


def _sizes(row: Row) -> str:
    sizes = [f"{name} {size:,}" for name, size in row.shape.items()]
    return ", ".join([*sizes, *(f"{name} {_plain(text)}" for name, text in row.settings.items() if name != "gradient")])


def _values(row: Row, rows: Sequence[Row], against: str) -> dict[str, Value]:
    """What was measured, and what follows from it."""
    if row.status != "ok" or not row.get("time"):
        return row.values
    more, milliseconds = {}, row.get("time") or 1.0
    other = next((other for other in rows if (other.case, other.implementation) == (row.case, against)), None)
    if against != BOUND and row.implementation != BOUND and other is not None and other.get("time"):
        more[f"of {against}"] = value(milliseconds / (other.get("time") or 1.0), "1")
    if (tokens := row.get("answer_tokens")) is not None and "rate" not in row.values:
        more["rate"] = value(1e3 * tokens / milliseconds, "tokens/s")
    return {**row.values, **more}


def _cell(found: Value | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None or found.count == 1:
        return number(found)
    return f"{number(found)} ({number(Value(found.low, '1'))} to {number(Value(found.high, '1'))}, {found.count} times)"


def _plain(text: str | None) -> str:
    """In one cell of a table."""
    return " ".join((text or "").replace("|", "\\|").replace("<", "&lt;").split())


# --- what scripts/gpu.sh left --------------------------------------------------------------------------------


def _gpu_section(found: Sequence[tuple[str, Run]]) -> list[str]:
    lines = ["## GPU runs", ""]
    if not found:
        return [*lines, "Not measured on a GPU: `scripts/gpu.sh` has not run on one yet.", ""]
    about = {phase.name: phase.about for phases in RUNS.values() for phase in phases}
    lines += ["What `scripts/gpu.sh` measured, phase by phase; of each phase what it got to.", ""]
    for name, run in found:
        lines += [f"### {name.removesuffix('.jsonl')}", ""]
        if run.damaged:
            lines += [f"Cut off in the file: line {', '.join(map(str, run.damaged))}.", ""]
        for phase in dict.fromkeys([*run.heads, *(row.table for row in run.rows)]):
            lines += [f"#### {phase}: {about.get(phase, 'a phase of another version')}", ""]
            head, end = run.heads.get(phase), run.ends().get(phase)
            lines += ["It left no head: it did not get that far.", ""] if head is None else _head(head)
            if end is None:
                lines += ["**Not finished**: the run ended before it.", ""]
            elif end.status != "ok":
                lines += [f"**{end.status}** after {end.seconds:.0f} s: {_plain(end.note)}", ""]
            lines += tables(run.of(phase)) or ["No rows.", ""]
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.report [--results DIR] [--out docs/performance.md]`: the measured numbers as a page.

Reads every file of the results folder and renders, for each device, the newest run of the tables loss, teacher and
step: the targets and whether they are met, tables, and plots (in images/ beside the page), always in the same way.
A file that is half-written, of another schema, or of a run that was stopped is an error, not something to skip: numbers
that nobody noticed missing are worse than none.

The files of `scripts/gpu.sh`, in the results' folder gpu/, are another matter: a lease ends when it ends, and the page
says what is missing.

Exit status: 0, or 2 with the reason on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import plots, targets, teacher_model
from benchmarks.gpu.phases import RUNS
from benchmarks.gpu.summary import number
from benchmarks.schema import BOUND, END, Head, Row, Run, by_case, read

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = {"N": "Rows", "D": "Width", "V": "Vocabulary", "workspace": "Chunk size (`workspace_bytes`)"}
AGAINST = {"loss": BOUND, "teacher": "concat", "step": "trl-sdft"}  # in every case that is timed
Files = dict[str, list[tuple[str, Head, list[Row]]]]  # by table, (file, head, rows) of the newest run of each device
Cell = Callable[[Row, "Row | None"], str]  # of a row and the row that it is compared with


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md", help="page to write")
    options = parser.parse_args(arguments)
    try:
        found = newest(options.results)
        text = page(found, gpu_runs(options.results))
        for table, runs in found.items():
            for _, head, rows in runs:
                plots.draw(plots.of(table, head, rows), options.out.parent / "images")
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


def newest(folder: Path) -> Files:
    """Of each table the newest run of each device, GPUs first.

    Raises ValueError for any file there that is not a whole run, whatever its table, and when there is no loss table.
    """
    found: dict[str, dict[str, tuple[str, Head, list[Row]]]] = {"loss": {}, "teacher": {}, "step": {}}
    for path in sorted(folder.glob("*.jsonl")):
        run = read(path)
        (table, head), *more = run.heads.items() or [("", None)]
        if run.damaged or more or head is None or table not in run.ends():
            raise ValueError(
                f"{path.name} is not one whole table: its run was stopped. Run it again, or move it out of {folder}"
            )
        _refuse_gaps(path.name, table, run.of(table))
        key = f"{head.device.kind != 'cuda'}{head.device.name}"
        if table in found and (key not in found[table] or found[table][key][1].date < head.date):
            found[table][key] = (path.name, head, run.of(table))
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


def page(found: Files, on_gpus: Sequence[tuple[str, Run]] = ()) -> str:
    """The page's Markdown."""
    lines = [
        "# Performance",
        "",
        "Written by `python -m benchmarks.report` from the files named below; do not edit. First "
        "the loss, then [the teacher](#the-shared-prefix-teacher), [whole steps](#whole-training-steps) and [what one "
        "lease of a GPU gave](#gpu-runs). "
        "[How it is measured](../benchmarks/README.md).",
        "",
    ]
    devices = [head.device.kind for runs in found.values() for _, head, _ in runs]
    devices += [head.device.kind for _, run in on_gpus for head in run.heads.values()]
    if "cuda" not in devices:
        lines += ["**Nothing here was measured on a GPU.**", ""]
    for table, title in (("loss", "## Targets"), ("teacher", "## The shared-prefix teacher"),
                         ("step", "## Whole training steps")):  # fmt: skip
        lines += [title, "", ABOUT[table], ""]
        if table != "loss":
            lines += [f"### Targets of the {table}", ""]
        judged = [(head, rows) for _, head, rows in found[table]]
        if table == "loss":  # a lease measures its main cases as they are
            judged += [(run.heads[table], [*run.of(table), *run.of("accuracy")]) for _, run in on_gpus
                       if table in run.heads]  # fmt: skip
        lines += [*targets.markdown(table, judged), ""]
        if not found[table]:
            lines += [f"No results file holds a run of `python -m benchmarks {table}`.", ""]
        for name, head, rows in found[table]:
            lines += [DEVICE[table].format(head.device.name), "", *_head(head, name)]
            lines += [line for part in TABLES[table](rows) for line in (*part, "")]
            lines += _plots(table, head, rows, name)
        if table == "teacher":
            lines += ["### What sharing can save", "", *teacher_model.markdown(), ""]
    return "\n".join([*lines, *_gpu_section(on_gpus)])


ABOUT = {
    "loss": "One call of the loss is forward and backward of the mean reverse KL over N rows.",
    "teacher": "One call gives the hidden states of a batch of answers after one context. Speed-up: over `concat`, "
    "plain transformers reading context and answer together. Of limit: the least time for what that row must compute, "
    "at the rate of bare matrix products in the same run, over its time. KV: keys and values of the context in all "
    "layers, in copies. Max |Δh|: against float32, each answer alone. "
    "[What is compared](../benchmarks/README.md#the-teacher).",
    "step": "One optimizer step: fresh answers, both models' forwards, loss, backward, update. `trl-sdft` is TRL's "
    "SDFTTrainer with the full vocabulary, the reverse KL and the base model as the teacher, the context in every "
    "teacher prompt. Peak: of a run, above what was held once the model was loaded. "
    "[What is compared](../benchmarks/README.md#whole-training-steps).",
}
DEVICE = {"loss": "## {}", "teacher": "### The teacher on {}", "step": "### Steps on {}"}


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
    if device.matmul_flops_per_second and device.copy_bytes_per_second:
        facts.append(f"a large bf16 product {device.matmul_flops_per_second / 1e12:.0f} TFLOP/s, "
                     f"a large copy {device.copy_bytes_per_second / 1e12:.2f} TB/s")  # fmt: skip
    facts += [f"{package} {version}" for package, version in head.versions.items() if version]
    facts += [f"`{name}={text}`" for name, text in head.environment.items()]
    lines = [(f"[{file}](../benchmarks/results/{file}): " if file else "") + "; ".join(facts) + ".", ""]
    for note in head.notes:
        lines += [f"> {note}", ""]
    return lines


# --- tables --------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], columns: dict[str, Cell], against: str = BOUND) -> list[str]:
    """One line per row: its implementation, the columns, and what is to be known of it."""
    other = next((row for row in rows if row.implementation == against and row.status == "ok"), None)
    lines = [f"| implementation | {' | '.join(columns)} | |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        if row.status != "ok":
            lines.append(f"| {row.implementation} |" + " |" * len(columns) + f" {row.status}: {row.note} |")
            continue
        cells = [cell(row, other) for cell in columns.values()]
        few = row.get("at_once") or 0.0
        parts = f"{few:g} answers at a time" if 0 < few < row.shape.get("batch", 0) else None
        notes = "; ".join(filter(None, [row.settings.get("gradient"), parts, row.note]))
        lines.append(f"| {row.implementation} | {' | '.join(cells)} | {notes} |")
    return lines


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"


def _time(row: Row, _: Row | None = None) -> str:
    found = row.values["time"]
    if found.count == 1:
        return f"{_ms(found.value or 0)} (one call)"
    return f"{_ms(found.value or 0)} ({_ms(found.low or 0)} to {_ms(found.high or 0)})"


def _of(name: str, form: str, scale: float = 1.0) -> Cell:
    """A value in a format; nothing where there is none."""
    return lambda row, _: "" if (found := row.get(name)) is None else form.format(found / scale)


_PEAK = _of("peak", "{:,.0f}", 2**20)


def _loss_tables(rows: Sequence[Row]) -> list[list[str]]:
    parts = []
    if any((row.get("of_bound") or 0) > 1 for row in rows):
        dtype = "the bare products run in the inputs' dtype, which need not be the fastest one here."
        parts.append([f"Above 100 %: {dtype}"])
    columns: dict[str, Cell] = {
        "ms (min to max)": _time, "of bound": _of("of_bound", "{:.0%}"), "peak MiB": _PEAK,
        "error of dL/dh": lambda row, _: "" if row.get("dL/dh") is None else
        f"{row.get('dL/dh'):.1e} at KL {row.get('mean_kl'):.1e}",
    }  # fmt: skip
    for case in by_case(row for row in rows if row.group == "main"):
        parts.append([f"### {_loss_title(case[0])}", "", *table(case, columns)])
    accuracy: dict[str, list[Row]] = {}
    for row in rows:
        if row.group == "accuracy":
            accuracy.setdefault(row.case.partition(", KL")[0], []).append(row)
    parts += [[f"### Gradient error, {_loss_title(of[0])}", "", *_error_table(of)] for of in accuracy.values()]
    for group, title in SWEEPS.items():
        if swept := [row for row in rows if row.group == group]:
            parts.append([f"### {title}", "", *_sweep_table(swept)])
    return parts


def _error_table(rows: Sequence[Row]) -> list[str]:
    """One line per implementation and gradient, one column per mean KL."""
    cases = by_case(rows)
    kls = [next((kl for row in case if (kl := row.get("mean_kl")) is not None), 0.0) for case in cases]
    lines = ["| implementation | of | " + " | ".join(f"KL {kl:.1e}" for kl in kls) + " | |",
             "|---" * (len(kls) + 3) + "|"]  # fmt: skip
    for first in cases[0]:
        mine = [next((row for row in case if row.implementation == first.implementation), first) for case in cases]
        bad = next((row for row in mine if row.status != "ok"), None)
        if bad is not None:
            lines.append(f"| {first.implementation} | |" + " |" * len(kls) + f" {bad.status}: {bad.note} |")
            continue
        for of in ("dL/dh", "dL/dW"):
            if of in first.values:
                cells = " | ".join(f"{row.get(of):.1e}" for row in mine)
                lines.append(f"| {first.implementation} | {of} | {cells} | {first.settings.get('gradient', '')} |")
    return lines


def _sweep_table(rows: Sequence[Row]) -> list[str]:
    """One line per case; of each implementation the time and its share of the bound."""
    names = list(dict.fromkeys(row.implementation for row in rows))
    lines = ["| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for case in by_case(rows):
        found = {row.implementation: row for row in case}
        size = case[0].shape.get("workspace_bytes") or next(
            (row.shape["workspace_bytes"] for row in case if "workspace_bytes" in row.shape), None)  # fmt: skip
        title = _loss_title(case[0]) + (f", {size / 2**20:,.0f} MiB" if size else "")
        lines.append(f"| {title} | " + " | ".join(_sweep_cell(found.get(name)) for name in names) + " |")
    return lines


def _sweep_cell(row: Row | None) -> str:
    if row is None or row.status != "ok":
        return "" if row is None else row.status
    told = [f"{_ms(row.get('time') or 0)} ms"]
    if row.implementation != BOUND:
        told += [_of("of_bound", "{:.0%}")(row, None), _of("peak", "{:,.0f} MiB", 2**20)(row, None)]
    return ", ".join(filter(None, told))


def _loss_title(row: Row) -> str:
    sizes = ", ".join(f"{name} {row.shape[name]:,}" for name in "NVD")
    return f"{sizes}, {row.settings['dtype']}, {row.settings['head']}"


def _teacher_tables(rows: Sequence[Row]) -> list[list[str]]:
    columns: dict[str, Cell] = {
        "ms (min to max)": _time,
        "speed-up": lambda row, concat: "" if concat is None or row.implementation == BOUND else
        f"{(concat.get('time') or 0) / (row.get('time') or 1):.1f}×",
        "of limit": _of("of_limit", "{:.0%}"), "peak MiB": _PEAK, "KV": _copies,
        "max \\|Δh\\|": _of("max_error", "{:.1e}"),
    }  # fmt: skip
    concat = AGAINST["teacher"]
    return [[f"#### {_teacher_title(case[0])}", "", *table(case, columns, concat)] for case in by_case(rows)]


def _copies(row: Row, _: Row | None) -> str:
    held, one = row.get("prefix"), row.get("one_prefix")
    if held is None or not one:
        return ""
    return f"{held / one:.4g}× ({held / 2**20:,.1f} MiB)" if held else "not kept"


def _teacher_title(row: Row) -> str:
    model = f"{row.settings['model']}, {row.settings['dtype']}"
    if row.group == "check":
        return f"First use, {model}"
    return f"Context {row.shape['context']:,}, {row.shape['batch']} answers of {row.shape['response']:,}, {model}"


def _step_tables(rows: Sequence[Row]) -> list[list[str]]:
    columns: dict[str, Cell] = {
        "s a step (min to max)": lambda row, _: "{:.2f} ({:.2f} to {:.2f}, {} steps)".format(
            *(1e-3 * (x or 0) for x in (row.values["time"].value, row.values["time"].low, row.values["time"].high)),
            row.values["time"].count),
        "of trl-sdft": lambda row, peer: "" if peer is None else
        f"{(row.get('time') or 0) / (peer.get('time') or 1):.2f}",
        "answer tokens a step": _of("answer_tokens", "{:.0f}"),
        "tokens/s": lambda row, _: f"{1e3 * (row.get('answer_tokens') or 0) / (row.get('time') or 1):.1f}",
        "peak MiB": _PEAK,
        "parts, s": lambda row, _: ", ".join(
            f"{part} {(found.value or 0) / 1e3:.2f}" for part, found in row.values.items()
            if found.unit == "ms" and part != "time"),
    }  # fmt: skip
    return [[f"#### {_step_title(case[0])}", "", *table(case, columns, AGAINST["step"])] for case in by_case(rows)]


def _step_title(row: Row) -> str:
    checkpointed = "checkpointed" if row.settings["checkpointing"] == "yes" else "not checkpointed"
    context = f", context {row.shape['context']:,}" if "context" in row.shape else ""
    return (f"{row.settings['model']}{context}, {row.shape['prompts']} answers of at most {row.shape['tokens']}, "
            f"{row.settings['dtype']}, {checkpointed}")  # fmt: skip


TABLES = {"loss": _loss_tables, "teacher": _teacher_tables, "step": _step_tables}


def _plots(table: str, head: Head, rows: Sequence[Row], file: str) -> list[str]:
    lines = []
    for plot in plots.of(table, head, rows):
        lines += [
            f"![{plot.title}](images/{plot.file})",
            "",
            f"{plot.title}: {head.device.name}, {head.date[:10]}, torch {head.versions.get('torch')}, "
            f"`{head.command}` ({file}).",
            "",
        ]
    return ["### Plots", "", *lines, ""] if lines and table == "loss" else lines


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
            head = run.heads.get(phase)
            lines += ["It left no head: it did not get that far.", ""] if head is None else _head(head)
            lines += [*_ended(run.ends().get(phase)), *_any_table(run.of(phase))]
    return lines


def _ended(last: Row | None) -> list[str]:
    if last is None:
        return ["**Not finished**: the run ended before it.", ""]
    if last.status == "ok":
        return []
    return [f"**{last.status}** after {last.seconds:.0f} s: {_plain(last.note)}", ""]


def _any_table(rows: Sequence[Row]) -> list[str]:
    """Rows of any kind; of tests that passed their number says enough."""
    if not rows:
        return ["No rows.", ""]
    lines = ["| what | shape | values |", "|---|---|---|"]
    passed = [row for row in rows if row.status == "ok" and "::" in row.case]
    for row in (row for row in rows if row not in passed and row.case != END):
        shape = ", ".join(f"{name} {size:,}" for name, size in row.shape.items())
        settings = ", ".join(f"{name} {_plain(text)}" for name, text in row.settings.items())
        values = ", ".join(f"{_plain(name)} {number(found)}" for name, found in row.values.items())
        told = f"**{row.status}**: {_plain(row.note)}" if row.status != "ok" else ""
        cells = "; ".join(filter(None, [shape, settings])), ". ".join(filter(None, [told, values]))
        lines.append(f"| {_plain(row.name)} | {cells[0]} | {cells[1]} |")
    if passed:
        lines.append(f"| {len(passed)} tests | | passed |")
    return [*lines, ""]


def _plain(text: str | None) -> str:
    """In one cell of a table."""
    return " ".join((text or "").replace("|", "\\|").replace("<", "&lt;").split())


if __name__ == "__main__":
    sys.exit(main())

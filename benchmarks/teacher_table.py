"""`python -m benchmarks.teacher_table --out DIR [--quick] [--groups main,context]`: the teacher side by side.

Time, peak memory, bytes of the context's keys and values, and the error of every way to score answers after a context,
as one JSON file and a table on the terminal; beside each time the limit that follows from what must be computed
(teacher_model.py) at the rate of bare matrix products of the same run. Runs on the GPU where there is one (a random
Qwen3-8B, bf16), else on the CPU (SmolLM2, float32). What cannot run is a row with the reason.
`python -m benchmarks.report` turns the files into docs/performance.md.

Exit status: 0 if everything ran or only a peer failed; 1 if ours failed in any case; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.measure import Failure, attempt, release, time_interleaved, with_peak
from benchmarks.schema import BOUND, TIMED_TEACHER_GROUPS, TeacherRow, Time, select
from benchmarks.teacher_cases import Case, Setting, cases, make_model, make_setting, references
from benchmarks.teacher_implementations import CONCAT, Contender, Implementation, implementations
from opcd_fast import ContextTeacher, InputError

SLOW_MS = 5_000.0  # a contender above this is timed no more than twice; on a GPU its first whole call is its time


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures CPU memory is talkative
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    start = time.monotonic()
    try:
        chosen = select(cases(device, options.quick), options.groups, TIMED_TEACHER_GROUPS)
        model, name, about = make_model(device, options.quick, options.layers)
    except (ValueError, InputError) as error:
        print(f"benchmarks.teacher_table: {error}", file=sys.stderr)
        return 2
    report = environment.start_report(*_title(options), device, [about, *options.notes])
    path = options.out / report.file_name()
    exact = references(model, chosen)
    release(device)
    ours_failed = False
    for case in chosen:
        setting = make_setting(model, case)
        if time.monotonic() - start > options.limit_seconds:
            reason = f"{options.limit_seconds:g} s had passed (--limit-seconds)"
            rows = [_row(case, i, setting, name, "skipped", reason) for i in implementations(case, setting)]
        else:
            rows = measure_case(case, setting, name, exact.get(case.name), options.case_seconds)
        report.teacher += rows
        report.write(path)
        print_rows(rows)
        ours_failed |= any(r.status in ("failed", "out of memory") for r in rows if r.implementation.startswith("opcd"))
    if not options.groups:
        report.teacher.append(_self_verification(make_setting(model, chosen[0]), chosen[0], name))
        print_rows(report.teacher[-1:])
    report.complete = True
    report.write(path)
    print(f"{len(report.teacher)} rows in {time.monotonic() - start:.0f} s: {path}")
    return int(ours_failed)


def _title(options: argparse.Namespace) -> tuple[str, str]:
    """The benchmark's name, which starts its file's name, and the command. A part of the table has its own name."""
    name, command = "teacher", "python -m benchmarks.teacher_table"
    if options.quick:
        name, command = name + "-quick", command + " --quick"
    if options.layers:
        name, command = f"{name}-{options.layers}-layers", f"{command} --layers {options.layers}"
    if options.groups:
        name, command = f"{name}-{'-'.join(options.groups)}", f"{command} --groups {','.join(options.groups)}"
    return name, command


def measure_case(case: Case, setting: Setting, model: str, exact: Tensor | None, seconds: float) -> list[TeacherRow]:
    """One row per implementation: first memory and error, one call each, then the interleaved times."""
    every = implementations(case, setting)
    rows = {i.name: _row(case, i, setting, model) for i in every}
    device = setting.device
    live: dict[str, Contender] = {}
    calls_left: dict[str, int] = {}
    for one in every:
        if one.skip:
            continue
        row = rows[one.name]
        built = attempt(lambda one=one: one.build(setting), device)  # type: ignore[misc]
        outcome = built if isinstance(built, Failure) else _first_call(one, built, row, exact, device)
        if isinstance(outcome, Failure):
            row.status, row.note = outcome.status, outcome.note
            continue
        live[one.name] = built
        if outcome > SLOW_MS:
            calls_left[one.name] = 0 if device.type == "cuda" else 2
            if device.type == "cuda":
                row.time_ms, row.status = Time(outcome, outcome, outcome, 1), "ok"
    timed = time_interleaved(
        {name: contender.call for name, contender in live.items()}, device,
        seconds=seconds, min_rounds=2 if device.type == "cuda" else 3, warm=True, untimed=False, at_most=calls_left,
    )  # fmt: skip
    for name, result in timed.items():
        if isinstance(result, Failure):
            rows[name].status, rows[name].note = result.status, result.note
        else:
            rows[name].time_ms, rows[name].status = result, "ok"
    bound = rows[BOUND]
    for row in rows.values():
        if bound.time_ms is not None and bound.flops and row.flops and row is not bound:
            row.limit_ms = row.flops / bound.flops * bound.time_ms.median
    return list(rows.values())


def _first_call(
    one: Implementation, contender: Contender, row: TeacherRow, exact: Tensor | None, device: torch.device
) -> float | Failure:
    """Milliseconds of one whole call; the row gets its peak memory, its error and what it holds."""
    taken: list[float] = []

    def timed() -> Tensor:
        begin = time.perf_counter()
        hidden = contender.call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - begin))
        return hidden

    if device.type == "cuda":  # kernels are compiled and handles are made before anything is measured
        warmed = attempt(contender.warm or contender.call, device)
        if isinstance(warmed, Failure):
            return warmed
        del warmed
    outcome = attempt(lambda: with_peak(timed, device), device)
    if isinstance(outcome, Failure):
        return outcome
    hidden, row.peak_bytes, reason = outcome
    notes = [one.note, reason]
    row.note = one.note
    if one.name == BOUND:  # its buffers are made beforehand
        row.peak_bytes = None
        return taken[0]
    row.sequences_at_once = contender.at_once or row.batch
    if exact is None:
        notes.append("no error: float32 over so long a sequence takes minutes")
    else:
        first_and_last = hidden.view(row.batch, row.response, -1)[[0, -1]]
        error = float((first_and_last.float() - exact).abs().max())
        if error != error or error == float("inf"):
            return Failure("failed", "hidden states hold NaN or infinities")
        row.max_error = error
    del hidden, outcome
    row.prefix_bytes = contender.held()
    row.note = "; ".join(filter(None, notes)) or None
    return taken[0]


def _self_verification(setting: Setting, case: Case, model: str) -> TeacherRow:
    """How long path="auto" takes to check itself, at the first use of a teacher: three teachers, three times."""
    taken = []
    for _ in range(3):
        teacher = ContextTeacher(setting.model, setting.context)
        begin = time.perf_counter()
        path = teacher.path
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - begin))
    row = _blank(case, "opcd_fast-auto", setting, model)
    row.case, row.group, row.status = "self-verification", "check", "ok"
    row.time_ms = Time(statistics.median(taken), min(taken), max(taken), len(taken))
    row.note = f"the check of first use, which chose path {path!r}; its memory and error are not measured"
    return row


def _row(
    case: Case, one: Implementation, setting: Setting, model: str, status: str = "failed", note: str = "not reached"
) -> TeacherRow:
    row = _blank(case, one.name, setting, model)
    row.flops = float(one.flops)
    row.status, row.note = ("skipped", one.skip) if one.skip else (status, note)
    return row


def _blank(case: Case, implementation: str, setting: Setting, model: str) -> TeacherRow:
    parameter = next(setting.body.parameters())
    return TeacherRow(
        case=case.name, implementation=implementation, model=model, layers=setting.shape.layers,
        context=case.context, response=case.response, batch=case.batch,
        dtype=str(parameter.dtype).removeprefix("torch."), group=case.group,
        one_prefix_bytes=setting.shape.kv_bytes(case.context, parameter.element_size()),
    )  # fmt: skip


def print_rows(rows: list[TeacherRow]) -> None:
    print(f"\n{rows[0].case}   {rows[0].model}, {rows[0].dtype}")
    print(f"  {'':26} {'ms':>10} {'x concat':>9} {'of limit':>9} {'peak MiB':>9} {'KV':>7} {'max |dh|':>9}")
    concat = next((row.time_ms for row in rows if row.implementation == CONCAT), None)
    for row in rows:
        if row.time_ms is None:
            print(f"  {row.implementation:26} {row.status}: {row.note}")
            continue
        cells = [
            f"{row.time_ms.median:.1f}",
            "" if concat is None or row.implementation == BOUND else f"{concat.median / row.time_ms.median:.2f}",
            "" if row.limit_ms is None else f"{row.limit_ms / row.time_ms.median:.0%}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
            "" if row.prefix_bytes is None or not row.one_prefix_bytes else
            f"{row.prefix_bytes / row.one_prefix_bytes:.4g}x",
            "" if row.max_error is None else f"{row.max_error:.1e}",
        ]  # fmt: skip
        widths = (10, 9, 9, 9, 7, 9)
        print(f"  {row.implementation:26} " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    sys.stdout.flush()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teacher_table", description=__doc__)
    names: Callable[[str], Any] = lambda text: text.split(",")  # noqa: E731
    groups = ", ".join(TIMED_TEACHER_GROUPS)
    parser.add_argument("--out", type=Path, required=True, help="directory for the JSON file")
    parser.add_argument("--quick", action="store_true", help="a tiny model: checks the flow, measures nothing")
    parser.add_argument("--groups", type=names, default=[], metavar="NAME,...", help=f"only of {groups}")
    parser.add_argument("--layers", type=int, help="of the model on a GPU; default: all of them")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument(
        "--case-seconds", type=float, default=8.0, help="of timing a case; 3 rounds at least, on a GPU 2"
    )
    parser.add_argument("--limit-seconds", type=float, default=330.0, help="no case starts after this long")
    parser.add_argument("--note", dest="notes", action="append", default=[], help="kept in the file; repeat")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.loss_table --out DIR [--quick] [--groups main,accuracy]`: the loss side by side.

Time, peak memory and gradient error of every implementation in every case, as one JSON file and a table on
the terminal. Runs on the GPU where there is one (real heads), else on the CPU (small ones). Other libraries are
part of it where they are installed, and rows "skipped" with the reason where they are not. What it leaves out:
other divergences. `python -m benchmarks.report` turns the files into docs/performance.md.

Exit status: 0 if everything ran or only a peer failed; 1 if ours failed in any case; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.loss_cases import ORACLE_ROWS, Case, Inputs, cases, make_inputs, oracle, oracle_rows
from benchmarks.loss_implementations import BOUND, Implementation, forget_compiled, implementations
from benchmarks.measure import Failure, attempt, release, time_interleaved, with_peak
from benchmarks.schema import GROUPS, GradientError, Row, select


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures CPU memory is talkative
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 would time Triton's interpreter; unset it", file=sys.stderr)
        return 2
    try:
        chosen = select(cases(device, options.quick), options.groups, GROUPS)
    except ValueError as error:
        print(f"--groups: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    report = environment.start_report(*_title(options), device, options.notes)
    path = options.out / report.file_name()
    ours_failed = False
    for case in chosen:
        if time.monotonic() - start > options.limit_seconds:
            rows = _without_time(case, device, f"{options.limit_seconds:g} s had passed (--limit-seconds)")
        else:
            rows = measure_case(case, device, options.case_seconds, options.without)
        report.rows += rows
        report.write(path)
        print_rows(rows)
        ours_failed |= any(r.status in ("failed", "out of memory") for r in rows if _is_ours(r))
    report.complete = True
    report.write(path)
    print(f"{len(report.rows)} rows in {time.monotonic() - start:.0f} s: {path}")
    return int(ours_failed)


def _title(options: argparse.Namespace) -> tuple[str, str]:
    """The benchmark's name, which starts its file's name, and the command. A part of the table has a name of its
    own: the report must not take it for the whole."""
    name, command = "loss", "python -m benchmarks.loss_table"
    if options.quick:
        name, command = name + "-quick", command + " --quick"
    if options.without:
        command += f" --without {','.join(options.without)}"
    if options.groups:
        name, command = f"{name}-{'-'.join(options.groups)}", f"{command} --groups {','.join(options.groups)}"
    return name, command


def measure_case(case: Case, device: torch.device, seconds: float, without: Sequence[str] = ()) -> list[Row]:
    """One row per implementation: first memory and accuracy, one call each, then the interleaved times."""
    contenders = [
        replace(c, skip="left out (--without)") if c.name in without and not c.skip else c
        for c in implementations(case, device)
    ]
    rows = {c.name: _row(case, c) for c in contenders}
    live = [c for c in contenders if not c.skip]
    forget_compiled()
    outcome = attempt(lambda: _fill(case, device, seconds, live, rows), device)
    if isinstance(outcome, Failure):
        # Not a contender's fault: the inputs or the oracle did not work.
        for contender in live:
            row = rows[contender.name]
            if row.time_ms is None:
                row.status, row.note = outcome.status, outcome.note
    return list(rows.values())


def _fill(case: Case, device: torch.device, seconds: float, live: list[Implementation], rows: dict[str, Row]) -> None:
    inputs = None
    for index, mean_kl in enumerate(case.kls):
        inputs = None  # one set of inputs at a time
        release(device)
        inputs = make_inputs(case, device, mean_kl)
        for contender, gradients in _first_calls(case, inputs, device, live, rows, measure_memory=index == 0):
            rows[contender.name].gradient_error += gradients
    assert inputs is not None
    release(device)
    if not case.timed:
        for contender in live:
            rows[contender.name].status, rows[contender.name].note = "ok", "accuracy only: not timed"
        return
    calls = {c.name: c.build(inputs) for c in live}
    timed = time_interleaved(calls, device, seconds=seconds, warm=True)
    for name, result in timed.items():
        if isinstance(result, Failure):
            rows[name].status, rows[name].note = result.status, result.note
        else:
            rows[name].time_ms, rows[name].status = result, "ok"
    bound = rows[BOUND].time_ms
    for row in rows.values():
        if bound is not None and row.time_ms is not None:
            row.bound_fraction = bound.median / row.time_ms.median


def _first_calls(
    case: Case,
    inputs: Inputs,
    device: torch.device,
    live: list[Implementation],
    rows: dict[str, Row],
    *,
    measure_memory: bool,
) -> Iterator[tuple[Implementation, list[GradientError]]]:
    """One call of each, with its gradients' errors; who fails leaves `live`."""
    # For the weight's gradient the oracle must see every row.
    whole = not case.timed and not case.frozen
    index = oracle_rows(inputs.h_s, case.N if whole else ORACLE_ROWS)
    kl, *exact = oracle(inputs.h_s[index], inputs.w_s, inputs.h_t[index], inputs.w_t, weight=whole)
    mean_kl = float(kl.mean())
    references = [gradient.div_(case.N) for gradient in exact if gradient is not None]
    for contender in list(live):
        if not (measure_memory or contender.is_loss):
            continue
        gradients = _first_call(contender, inputs, device, rows[contender.name], measure_memory=measure_memory)
        if gradients is None:
            live.remove(contender)
        elif contender.is_loss:
            yield contender, gradient_errors(gradients, references, index, mean_kl)
        gradients = None  # not kept while the next one runs


def gradient_errors(
    gradients: Sequence[torch.Tensor], references: Sequence[torch.Tensor], index: torch.Tensor, mean_kl: float
) -> list[GradientError]:
    """Of dL/dh on the rows of `index`, and of dL/dW where there is a reference for it."""
    found = (gradients[0][index], *gradients[1:])
    errors = (_relative_error(value, reference) for value, reference in zip(found, references))
    return [GradientError(mean_kl, error, len(index), of) for error, of in zip(errors, ("hidden", "weight"))]


def _relative_error(value: torch.Tensor, reference: torch.Tensor) -> float | None:
    error = (value.double() - reference).norm() / reference.norm()
    return float(error) if bool(error.isfinite()) else None


def _first_call(
    contender: Implementation, inputs: Inputs, device: torch.device, row: Row, *, measure_memory: bool
) -> tuple[torch.Tensor, ...] | None:
    """The gradients of one call, or None if it failed; the row gets the peak or the reason."""
    call = contender.build(inputs)
    if not measure_memory:
        outcome = attempt(call, device)
        if isinstance(outcome, Failure):
            row.status, row.note = outcome.status, outcome.note
            return None
        return outcome
    # Kernels are compiled and handles are made before the memory is measured.
    compiles = device.type == "cuda" or contender.compiles
    outcome = attempt(call, device) if compiles else None
    if not isinstance(outcome, Failure):
        outcome = None
        outcome = attempt(lambda: with_peak(call, device), device)
    if isinstance(outcome, Failure):
        row.status, row.note = outcome.status, outcome.note
        return None
    gradients, row.peak_bytes, reason = outcome
    if not contender.is_loss and device.type != "cuda":
        row.peak_bytes, reason = None, "no peak: its buffers are made beforehand"
    row.note = reason
    return gradients


def _row(case: Case, contender: Implementation, status: str = "failed", note: str = "not reached") -> Row:
    if contender.skip:
        status, note = "skipped", contender.skip
    return Row(
        case=case.name,
        implementation=contender.name,
        N=case.N,
        V=case.V,
        D=case.D,
        dtype=case.dtype_name,
        frozen=case.frozen,
        status=status,
        exact=contender.exact,
        group=case.group,
        workspace_bytes=case.workspace_bytes if contender.ours else None,
        note=note,
    )


def _without_time(case: Case, device: torch.device, reason: str) -> list[Row]:
    return [_row(case, contender, "skipped", reason) for contender in implementations(case, device)]


def _is_ours(row: Row) -> bool:
    return row.implementation.startswith("opcd_fast")


def print_rows(rows: list[Row]) -> None:
    print(f"\n{rows[0].case}   V={rows[0].V} D={rows[0].D}")
    print(f"  {'':20} {'ms':>10} {'of bound':>9} {'peak MiB':>10}   gradient error (mean KL)")
    for row in rows:
        if row.status != "ok":
            print(f"  {row.implementation:20} {row.status}: {row.note}")
            continue
        time_ms = "" if row.time_ms is None else f"{row.time_ms.median:.2f}"
        bound = "" if row.bound_fraction is None else f"{row.bound_fraction:.0%}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        errors = "  ".join(
            f"{'nan' if e.relative_error is None else format(e.relative_error, '.2e')}"
            f" ({'dW ' if e.of == 'weight' else ''}{e.mean_kl:.1e})"
            for e in row.gradient_error
        )
        label = "" if row.exact else "  inexact"
        print(f"  {row.implementation:20} {time_ms:>10} {bound:>9} {peak:>10}   {errors}{label}")
    sys.stdout.flush()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_table", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the JSON file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: checks the flow, measures nothing")
    parser.add_argument("--groups", type=_names, default=[], metavar="NAME,...", help=f"only of {', '.join(GROUPS)}")
    parser.add_argument("--without", type=_names, default=[], metavar="NAME,...", help="implementations to leave out")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--case-seconds", type=float, default=8.0, help="of timing a case; 3 rounds at least")
    parser.add_argument("--limit-seconds", type=float, default=280.0, help="no case starts after this long")
    parser.add_argument("--note", dest="notes", action="append", default=[], help="kept in the file; repeat")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())

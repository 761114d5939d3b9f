"""`python -m benchmarks.loss_table --out DIR [--quick]`: the loss against plain PyTorch and the bare GEMMs.

Time, peak memory and gradient error of every implementation in every case, as one JSON file and a table on
the terminal. Runs on the GPU where there is one (real heads), else on the CPU (small ones). What it leaves
out: other libraries, other divergences, and how time depends on the chunk sizes.

Exit status: 0 if everything ran or only a peer failed; 1 if ours failed in any case; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.loss_cases import KLS, Case, Inputs, cases, make_inputs, oracle, oracle_rows
from benchmarks.loss_implementations import BOUND, Implementation, implementations
from benchmarks.measure import Failure, attempt, release, time_interleaved, with_peak
from benchmarks.schema import GradientError, Row


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures CPU memory is talkative
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 would time Triton's interpreter; unset it", file=sys.stderr)
        return 2
    start = time.monotonic()
    name = "loss-quick" if options.quick else "loss"
    command = "python -m benchmarks.loss_table" + (" --quick" if options.quick else "")
    report = environment.start_report(name, command, device, options.notes)
    path = options.out / report.file_name()
    ours_failed = False
    for case in cases(device, options.quick):
        if time.monotonic() - start > options.limit_seconds:
            rows = _without_time(case, device, f"{options.limit_seconds:g} s had passed (--limit-seconds)")
        else:
            rows = measure_case(case, device, options.case_seconds)
        report.rows += rows
        report.write(path)
        print_rows(rows)
        ours_failed |= any(r.status in ("failed", "out of memory") for r in rows if _is_ours(r))
    report.complete = True
    report.write(path)
    print(f"{len(report.rows)} rows in {time.monotonic() - start:.0f} s: {path}")
    return int(ours_failed)


def measure_case(case: Case, device: torch.device, seconds: float) -> list[Row]:
    """One row per implementation: first memory and accuracy, one call each, then the interleaved times."""
    contenders = implementations(case, device)
    rows = {c.name: _row(case, c) for c in contenders}
    outcome = attempt(lambda: _fill(case, device, seconds, contenders, rows), device)
    if isinstance(outcome, Failure):
        # Not a contender's fault: the inputs or the oracle did not work.
        for row in rows.values():
            if row.time_ms is None:
                row.status, row.note = outcome.status, outcome.note
    return list(rows.values())


def _fill(
    case: Case,
    device: torch.device,
    seconds: float,
    contenders: list[Implementation],
    rows: dict[str, Row],
) -> None:
    live = list(contenders)
    inputs = None
    for index, mean_kl in enumerate(KLS):
        inputs = None  # one set of inputs at a time
        release(device)
        inputs = make_inputs(case, device, mean_kl)
        index_of_rows = oracle_rows(inputs.h_s)
        chosen = inputs.h_s[index_of_rows], inputs.w_s, inputs.h_t[index_of_rows], inputs.w_t
        kl, reference = oracle(*chosen)
        del chosen  # or the head would outlive its inputs
        assert reference is not None
        reference /= case.N
        for contender in list(live):
            if index > 0 and not contender.is_loss:
                continue
            row = rows[contender.name]
            dh = _first_call(contender, inputs, device, row, measure_memory=index == 0)
            if dh is None:
                live.remove(contender)
            elif contender.is_loss:
                error = (dh[index_of_rows].double() - reference).norm() / reference.norm()
                row.gradient_error.append(
                    GradientError(
                        mean_kl=float(kl.mean()),
                        relative_error=float(error) if bool(error.isfinite()) else None,
                        rows=len(index_of_rows),
                    )
                )
    assert inputs is not None
    release(device)
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


def _first_call(
    contender: Implementation, inputs: Inputs, device: torch.device, row: Row, *, measure_memory: bool
) -> torch.Tensor | None:
    """dL/dh of one call, or None if it failed; the row gets the peak or the reason."""
    call = contender.build(inputs)
    if not measure_memory:
        outcome = attempt(call, device)
        if isinstance(outcome, Failure):
            row.status, row.note = outcome.status, outcome.note
            return None
        return outcome[0]
    # Kernels are compiled and handles are made before the memory is measured.
    outcome = attempt(call, device) if device.type == "cuda" else None
    if not isinstance(outcome, Failure):
        outcome = None
        outcome = attempt(lambda: with_peak(call, device), device)
    if isinstance(outcome, Failure):
        row.status, row.note = outcome.status, outcome.note
        return None
    result, row.peak_bytes, reason = outcome
    if not contender.is_loss and device.type != "cuda":
        row.peak_bytes, reason = None, "no peak: its buffers are made beforehand"
    row.note = reason
    return result[0]


def _row(case: Case, contender: Implementation, status: str = "failed", note: str = "not reached") -> Row:
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
        if row.time_ms is None:
            print(f"  {row.implementation:20} {row.status}: {row.note}")
            continue
        bound = "" if row.bound_fraction is None else f"{row.bound_fraction:.0%}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        errors = "  ".join(
            f"{'nan' if e.relative_error is None else format(e.relative_error, '.2e')} ({e.mean_kl:.1e})"
            for e in row.gradient_error
        )
        label = "" if row.exact else "  inexact"
        print(f"  {row.implementation:20} {row.time_ms.median:10.2f} {bound:>9} {peak:>10}   {errors}{label}")
    sys.stdout.flush()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_table", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the JSON file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: checks the flow, measures nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--case-seconds", type=float, default=8.0, help="of timing a case; 3 rounds at least")
    parser.add_argument("--limit-seconds", type=float, default=270.0, help="no case starts after this long")
    parser.add_argument("--note", dest="notes", action="append", default=[], help="kept in the file; repeat")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

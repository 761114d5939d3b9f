"""`python -m benchmarks.step_table --out DIR [--quick] [--groups main,...]`: whole training steps side by side.

One step is an optimizer step on a context: fresh answers, both models' forwards, the loss, backward and the update.
Ours, and TRL's SDFTTrainer on the same model, prompts, context, LoRA and sampling settings. Each trainer runs in
processes of its own (`benchmarks.step_worker`), one after the other in turns, so that a noisy machine meets all alike.
`python -m benchmarks.report` turns the file into docs/performance.md.

Exit status: 0 if everything ran or only a peer failed; 1 if ours failed in any case; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.gpu.phases import PEERS, TRAINING
from benchmarks.measure import Failure
from benchmarks.schema import STEP_GROUPS, StepRow, Time, select
from benchmarks.step_cases import Case, cases
from benchmarks.step_report import OURS, PEER

TRAINERS = (OURS, PEER, "opcd_fast in trl", "trl-sdft, our loss")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    start = time.monotonic()
    try:
        chosen = select(cases(device, options.quick), options.groups, STEP_GROUPS)
    except ValueError as error:
        print(f"benchmarks.step_table: {error}", file=sys.stderr)
        return 2
    name = "-".join(filter(None, ["step", "quick" if options.quick else "", *options.groups]))
    command = " ".join(["python -m benchmarks.step_table", *(["--quick"] if options.quick else []),
                        *([f"--groups {','.join(options.groups)}"] if options.groups else [])])  # fmt: skip
    report = environment.start_report(name, command, device, list(options.notes))
    path = options.out / report.file_name()
    for case in chosen:
        report.steps += measure_case(case, device, options, start)
        report.write(path)
        print_rows(report.steps, case)
    report.complete = True
    report.write(path)
    print(f"{len(report.steps)} rows in {time.monotonic() - start:.0f} s: {path}")
    return int(any(row.status not in ("ok", "skipped") for row in report.steps if row.implementation == OURS))


def measure_case(case: Case, device: torch.device, options: argparse.Namespace, start: float) -> list[StepRow]:
    """One row per trainer, from `--rounds` processes each, in turns."""
    found: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in options.trainers}
    failed: dict[str, Failure] = {}
    for turn in range(options.rounds):
        for trainer in options.trainers:
            if trainer in failed:
                continue
            left = options.limit_seconds - (time.monotonic() - start)
            if left <= 0:
                if not found[trainer]:
                    failed[trainer] = Failure("skipped", f"{options.limit_seconds:g} s had passed (--limit-seconds)")
                continue
            outcome = one_process(case, trainer, device, options.steps, timeout=left + 300)
            if isinstance(outcome, Failure):
                failed[trainer] = outcome
            else:
                found[trainer].append(outcome)
                print(f"{case.name}, {trainer}, turn {turn + 1}: {outcome['seconds']}", flush=True)
    context = next((o["context"] for outcomes in found.values() for o in outcomes if o["context"]), 0)
    return [_row(case, trainer, context, found[trainer], failed.get(trainer)) for trainer in options.trainers]


def one_process(
    case: Case, trainer: str, device: torch.device, steps: int, timeout: float
) -> dict[str, Any] | Failure:
    """What the worker printed, or why it did not."""
    command = [sys.executable, "-m", "benchmarks.step_worker", case.name, trainer, "--steps", str(steps),
               "--device", str(device)]  # fmt: skip
    settings = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **TRAINING}
    if trainer != OURS:
        settings |= PEERS
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **settings},
                              cwd=environment.ROOT)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Failure("failed", f"stopped after {timeout:.0f} s")
    if done.returncode:
        last = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "no message")
        if "No module named" in last:
            return Failure("skipped", last[:300])
        return Failure("out of memory" if "OutOfMemoryError" in last else "failed", last[:300])
    outcome: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return outcome


def _row(
    case: Case, trainer: str, context: int, found: list[dict[str, Any]], failure: Failure | None
) -> StepRow:
    row = StepRow(
        case=case.name, implementation=trainer, model=case.model, prompts=case.prompts, tokens=case.tokens,
        context=max(1, context), dtype=case.dtype, checkpointing=case.checkpointing, group=case.group,
    )  # fmt: skip
    if not found:
        row.status, row.note = (failure.status, failure.note) if failure else ("failed", "no process ran")
        return row
    if failure is not None:
        row.note = f"a later process {failure.status}: {failure.note}"
    seconds = [s for outcome in found for s in outcome["seconds"]]
    row.time_ms = Time(1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds), len(seconds))
    row.answer_tokens = statistics.mean(t for outcome in found for t in outcome["answer_tokens"])
    row.peak_bytes = max(outcome["peak_bytes"] for outcome in found)
    row.parts_ms = {part: 1e3 * statistics.mean(o["parts"][part] for o in found) for part in found[0]["parts"]}
    return row


def print_rows(rows: list[StepRow], case: Case) -> None:
    rows = [row for row in rows if row.case == case.name]
    peer = next((row.time_ms for row in rows if row.implementation == PEER), None)
    print(f"\n{case.name}")
    print(f"  {'':22} {'s a step':>9} {'x trl-sdft':>11} {'tokens':>8} {'peak MiB':>9}")
    for row in rows:
        if row.time_ms is None:
            print(f"  {row.implementation:22} {row.status}: {row.note}")
            continue
        ratio = "" if peer is None else f"{row.time_ms.median / peer.median:.2f}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        seconds, tokens = row.time_ms.median / 1e3, row.answer_tokens or 0.0
        print(f"  {row.implementation:22} {seconds:>9.2f} {ratio:>11} {tokens:>8.0f} {peak:>9}")
        if row.parts_ms:
            print("  " + " " * 22 + "  " + ", ".join(f"{part} {ms / 1e3:.2f}" for part, ms in row.parts_ms.items()))
    sys.stdout.flush()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_table", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the JSON file")
    parser.add_argument("--quick", action="store_true", help="a tiny model: checks the flow, measures nothing")
    parser.add_argument("--groups", type=lambda text: text.split(","), default=[], metavar="NAME,...",
                        help=f"only of {', '.join(STEP_GROUPS)}")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--trainers", type=_trainers, default=TRAINERS, metavar="NAME;...",
                        help=f"only of {'; '.join(TRAINERS)}")  # fmt: skip
    parser.add_argument("--steps", type=_count, default=3, help="timed steps of each process, after one more")
    parser.add_argument("--rounds", type=_count, default=2, help="processes of each trainer")
    parser.add_argument("--limit-seconds", type=float, default=1800.0, help="no process starts after this long")
    parser.add_argument("--note", dest="notes", action="append", default=[], help="kept in the file; repeat")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _trainers(text: str) -> tuple[str, ...]:
    names = tuple(text.split(";"))
    if unknown := sorted(set(names) - set(TRAINERS)):
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {'; '.join(TRAINERS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())

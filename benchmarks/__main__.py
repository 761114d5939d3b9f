"""`python -m benchmarks loss|teacher|step --out DIR [--quick] [--groups main,…]`: a table, as one file of JSON lines.

    loss     time, peak memory and gradient error of the loss, ours beside other libraries' and plain PyTorch
    teacher  hidden states of many answers after one context: time, peak memory, copies of the context, error
    step     whole training steps, ours beside TRL's, each trainer in processes of its own

A GPU where there is one, with real heads and models, small ones on a CPU otherwise. A table that was stopped goes on
where it was when it is started again on the same day. `python -m benchmarks.report` makes docs/performance.md of them.

Exit status: 0 if everything ran or only a peer failed; 1 if ours failed in any case; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, loss, loss_cases, step, step_cases, teacher, teacher_cases
from benchmarks.schema import BAD, read
from benchmarks.session import Session
from opcd_fast import InputError

CASES: dict[str, Any] = {"loss": loss_cases, "teacher": teacher_cases, "step": step_cases}
LIMITS = {"loss": 280.0, "teacher": 330.0, "step": 1800.0}  # seconds after which no case starts


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures CPU memory is talkative
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
            raise ValueError("TRITON_INTERPRET=1 would time Triton's interpreter; unset it")
        source = CASES[options.table]
        cases = select(source.cases(device, options.quick), options.groups, source.GROUPS)
        made = None
        if options.table == "teacher":
            made = teacher_cases.make_model(device, options.quick, options.layers)
        session = _session(options, device, [] if made is None else [made[2]])
    except (ValueError, InputError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if made is not None:
        exact = teacher_cases.references(made[0], cases)
    for case in cases:
        if options.table == "loss":
            loss.measure(session, case, without=options.without, seconds=options.case_seconds)
        elif options.table == "step":
            step.measure(session, case, trainers=options.trainers, steps=options.steps, rounds=options.rounds)
        elif made is not None:
            teacher.measure(session, case, *made[:2], exact.get(case.name), seconds=options.case_seconds)
    if made is not None and not options.groups:
        teacher.measure_check(session, cases[0], *made[:2])
    session.finish()
    print(f"{len(session.rows)} rows: {session.out}")
    return int(any(row.status in BAD for row in session.rows if row.implementation.startswith("opcd_fast")))


def select(cases: Iterable[Any], groups: list[str], possible: tuple[str, ...]) -> list[Any]:
    """The cases of these groups, all of them if none is named. Raises ValueError for a name that is no group."""
    if wrong := sorted(set(groups) - set(possible)):
        raise ValueError(f"--groups: unknown group {wrong[0]!r}; expected one of {', '.join(possible)}")
    return [case for case in cases if not groups or case.group in groups]


def _session(options: argparse.Namespace, device: torch.device, notes: list[str]) -> Session:
    """The table's name starts its file's name. A part of the table has a name of its own: the report must not take it
    for the whole."""
    parts = [options.table, "quick" if options.quick else "", f"{options.layers}-layers" if options.layers else "",
             *options.groups]  # fmt: skip
    name = "-".join(filter(None, parts))
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    path: Path = options.out / f"{name}_{environment.describe(device, ceilings=False).slug}_{date}.jsonl"
    if read(path).ends():
        path.unlink()  # it was whole; whoever asks again wants it anew
    command = f"python -m benchmarks {options.table}" + (" --quick" if options.quick else "")
    command += "".join(f" --{what} {given}" for what, given in (
        ("groups", ",".join(options.groups)), ("without", ",".join(options.without)), ("layers", options.layers),
    ) if given)  # fmt: skip
    return Session(name, path, device=device, dry=options.quick, seconds=options.limit_seconds, command=command,
                   notes=[*notes, *options.notes], ceilings=True)  # fmt: skip


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("table", choices=CASES)
    parser.add_argument("--out", type=Path, required=True, help="directory for the file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: checks the flow, measures nothing")
    parser.add_argument("--groups", type=_names, default=[], metavar="NAME,...", help="only cases of these")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--limit-seconds", type=float, help="no case starts after this long")
    parser.add_argument("--note", dest="notes", action="append", default=[], help="kept in the file; repeat")
    parser.add_argument("--case-seconds", type=float, default=8.0, help="of timing a case; 3 rounds at least")
    parser.add_argument("--without", type=_names, default=[], metavar="NAME,...", help="loss: what to leave out")
    parser.add_argument("--layers", type=int, help="teacher: of the model on a GPU; default: all of them")
    parser.add_argument("--trainers", type=_trainers, default=step.TRAINERS, metavar="NAME;...",
                        help=f"step: only of {'; '.join(step.TRAINERS)}")  # fmt: skip
    parser.add_argument("--steps", type=_count, default=3, help="step: timed steps of each process, after one more")
    parser.add_argument("--rounds", type=_count, default=2, help="step: processes of each trainer")
    options = parser.parse_args(arguments)
    options.limit_seconds = LIMITS[options.table] if options.limit_seconds is None else options.limit_seconds
    # An option of another table must not be taken and ignored.
    for name, table in (("without", "loss"), ("layers", "teacher"), ("trainers", "step"), ("steps", "step"),
                        ("rounds", "step")):  # fmt: skip
        if table != options.table and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name} is for {table}")
    if options.table == "step" and options.case_seconds != parser.get_default("case_seconds"):
        parser.error("--case-seconds is not for step: give --steps and --rounds")
    return options


def _names(text: str) -> list[str]:
    return text.split(",")


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{count} must be at least 1")
    return count


def _trainers(text: str) -> tuple[str, ...]:
    names = tuple(text.split(";"))
    if unknown := sorted(set(names) - set(step.TRAINERS)):
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {'; '.join(step.TRAINERS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())

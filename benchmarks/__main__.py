"""`python -m benchmarks NAME --out DIR [OPTION=VALUE ...]`: a benchmark's table, as one file of JSON lines in DIR.

    python -m benchmarks loss --out benchmarks/results             time, peak memory and gradient error of the loss
    python -m benchmarks teacher --out DIR groups=main,context     options are those of the benchmark's `run`
    python -m benchmarks gpu.decoding --out DIR --dry-run          tiny shapes on the CPU: checks the flow
    python -m benchmarks first|second --out DIR [--only PHASE,…]   every phase of a GPU run, as `scripts/gpu.sh` does

A benchmark is a module here or in gpu/ that has `run(session, *, option=default, …)`. A GPU is used where there is one.
A table that was stopped goes on where it was when it is started again on the same day.

Exit status: 0 if everything ran or only a peer failed; 1 if ours failed in any case; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu.phases import RUNS
from benchmarks.gpu.runner import run as run_phases

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("name", choices=[*RUNS, *names()], metavar="NAME", help=", ".join([*RUNS, *names()]))
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="of that benchmark; lists with commas")
    parser.add_argument("--out", type=Path, required=True, help="a folder; the file of a run for one of its phases")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: measures nothing")
    parser.add_argument(
        "--seconds", type=float, default=1e6, help="after which no case starts; of a run: for everything"
    )
    parser.add_argument("--note", dest="notes", action="append", default=[], help="kept in the file; repeat")
    parser.add_argument("--phase", help="what the runner of a GPU run gives: the table's name in its file")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="PHASE,...")
    given = parser.parse_intermixed_args(arguments)
    try:
        if given.name in RUNS:
            return run_phases(given.name, given.out, dry=given.dry_run, seconds=given.seconds, only=given.only)
        return _table(given)
    except ValueError as error:  # an InputError is one
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def names() -> list[str]:
    """Of all benchmarks: the modules that have `run(session)`."""
    found = [path for path in HERE.rglob("*.py") if "\ndef run(session: Session" in path.read_text(encoding="utf-8")]
    return sorted(".".join(path.relative_to(HERE).with_suffix("").parts) for path in found)


def _table(given: argparse.Namespace) -> int:
    import torch

    from benchmarks import environment
    from benchmarks.schema import BAD, read
    from benchmarks.session import Session

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures CPU memory is talkative
    on_gpu = not given.dry_run and (given.phase or torch.cuda.is_available())  # a phase measures nothing elsewhere
    device = torch.device("cuda" if on_gpu else "cpu")
    if given.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 would time Triton's interpreter; unset it")
    run = importlib.import_module(f"benchmarks.{given.name}").run
    options = options_of(run, given.options)
    # A part of a table has a name of its own: the report must not take it for the whole.
    parts = [given.name, *(["dry"] if given.dry_run else []), *given.options]
    table = given.phase or re.sub(r"[^\w.=-]+", "_", "-".join(parts))
    out = given.out
    if not given.phase:
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        out = given.out / f"{table}_{environment.describe(device).slug}_{date}.jsonl"
        if read(out).ends():
            out.unlink()  # it was whole; whoever asks again wants it anew
    command = " ".join(["python -m benchmarks", given.name, *(["--dry-run"] if given.dry_run else []), *given.options])
    session = Session(table, out, device=device, dry=given.dry_run, seconds=given.seconds,
                      command=command, notes=given.notes)  # fmt: skip
    try:
        run(session, **options)
    except ValueError:
        if session.rows:  # no argument's fault
            traceback.print_exc()
        elif not given.phase:
            out.unlink()
        raise
    if given.phase:  # its runner says how it ended
        return 0
    session.finish()
    print(f"{len(session.rows)} rows: {out}")
    return int(any(row.status in BAD for row in session.rows if "opcd_fast" in row.name))


def options_of(run: Callable[..., Any], given: list[str]) -> dict[str, Any]:
    """The keywords for `run`, each of its default's type. Raises ValueError for one that it does not have."""
    known = {name: option.default for name, option in inspect.signature(run).parameters.items() if name != "session"}
    found: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known or not value:
            raise ValueError(f"{text!r}: expected OPTION=VALUE with one of {', '.join(known) or 'no option'}")
        kind = type(known[name])
        found[name] = tuple(re.split(r",(?! )", value)) if kind is tuple else kind(value)
    return found


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.gpu first|second|PHASE [--out …] [--dry-run] [--only PHASE,…]`.

    python -m benchmarks.gpu first --out FOLDER               every phase, as `scripts/gpu.sh` does
    python -m benchmarks.gpu loss --out FILE.jsonl --dry-run  one phase in this process

Exit status: 0 if nothing failed, 1 if something did, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.gpu.phases import RUNS

PHASES = {phase.name: phase for phases in RUNS.values() for phase in phases}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("name", choices=[*RUNS, *PHASES], metavar="first|second|PHASE")
    parser.add_argument("--out", type=Path, required=True, help="a folder for a run, a .jsonl file for a phase")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: checks the flow")
    parser.add_argument("--seconds", type=float, help="for everything; default: what phases.py says")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="PHASE,...")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(PHASES):
        parser.error(f"--only: {sorted(unknown)[0]!r} is none of {', '.join(PHASES)}")
    if options.name in RUNS:
        from benchmarks.gpu.runner import run

        return run(options.name, options.out, dry=options.dry_run, seconds=options.seconds, only=options.only)
    if options.only:
        parser.error("--only is for a run")
    import torch

    from benchmarks.session import Session

    command = f"python -m benchmarks.gpu {options.name}" + (" --dry-run" if options.dry_run else "")
    session = Session(
        options.name, options.out, device=torch.device("cpu" if options.dry_run else "cuda"), dry=options.dry_run,
        seconds=options.seconds or PHASES[options.name].seconds, command=command,
    )  # fmt: skip
    importlib.import_module(f"benchmarks.gpu.{options.name}").run(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every phase in a process of its own, under its own limit; whatever one does, the others keep their results and time.

Knows nothing of torch: it starts at once and cannot be taken down by a broken device.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from benchmarks.gpu.phases import DRY_SECONDS, ENDING, SECONDS, Phase, schedule
from benchmarks.gpu.summary import summary
from benchmarks.schema import BAD, BROKEN, Row, append, end, marker, read

ROOT = Path(__file__).resolve().parents[2]
LEAST = 6.0  # seconds; a process with less would not get through its imports
GRACE = 2.0  # from asking to end to ending


class Stopped(Exception):
    """Somebody asked the run to end."""


def run(
    name: str,
    folder: Path,
    *,
    dry: bool = False,
    seconds: float = 1e6,
    only: Sequence[str] = (),
    module: str = "benchmarks",
) -> int:
    """All phases of a run, or those of `only`; 0 if nothing failed. The last lines printed are the summary.

    seconds: for everything; never more than the run has. module: what a phase's process runs.
    Raises ValueError for a phase that the run does not have.
    """
    start = time.monotonic()
    total = min(seconds, DRY_SECONDS if dry else SECONDS[name])
    hard = start + total - ENDING
    phases = [phase.name for phase, _ in schedule(name)]
    if unknown := sorted(set(only) - set(phases)):
        raise ValueError(f"--only: {unknown[0]!r} is none of {', '.join(phases)}")
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H%M%S")
    lines, log = folder / f"gpu_{name}_{stamp}.jsonl", folder / f"gpu_{name}_{stamp}.log"
    chosen = [(phase, last) for phase, last in schedule(name) if not only or phase.name in only]
    signal.signal(signal.SIGTERM, _stop)
    try:
        for phase, last in chosen:
            limit = hard if dry or only else min(start + last, hard)
            append(lines, _phase(phase, lines, log, limit, dry, module))
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"== stopped: {type(stopped).__name__}", flush=True)
        marker(lines).unlink(missing_ok=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    found = read(lines)
    print("\n".join(summary(found, [phase.name for phase, _ in chosen], folder, time.monotonic() - start)))
    sys.stdout.flush()
    bad = [row for row in found.rows if row.status in BAD]
    return int(bool(bad) or len(found.ends()) < len(chosen))


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped


def _phase(phase: Phase, lines: Path, log: Path, limit: float, dry: bool, module: str) -> Row:
    """Run it, again behind a row that broke the device or the process; how it ended."""
    begin = time.monotonic()
    if limit - begin < LEAST:
        return end(phase.name, read(lines).of(phase.name), "skipped", f"{max(0.0, limit - begin):.0f} s were left")
    print(f"== {phase.name}: {phase.about} (at most {limit - begin:.0f} s)", flush=True)
    offset = log.stat().st_size if log.exists() else 0
    code: int | None = BROKEN
    died = False
    while (code == BROKEN or died) and limit - time.monotonic() >= LEAST:
        code = _process(phase, lines, log, limit, dry, module)
        died = _unwritten(phase, lines, code, _last(log, offset)) and bool(code)
    seconds = time.monotonic() - begin
    status, note = "ok", None
    if code is None:
        status, note = "timeout", f"stopped after {seconds:.0f} s"
    elif code:
        status, note = "failed", f"exit status {code}: {_last(log, offset)}"
    print(f"== {phase.name}: {status}, {seconds:.0f} s {note or ''}", flush=True)
    return end(phase.name, read(lines).of(phase.name), status, note, seconds)


def _unwritten(phase: Phase, lines: Path, status: int | None, said: str) -> bool:
    """Write the row that the process did not live to write; whether there was one."""
    place = marker(lines)
    if not place.exists():
        return False
    name = place.read_text()
    place.unlink()
    if any(row.name == name for row in read(lines).of(phase.name)):
        return False
    row = Row(phase.name, name, status="timeout", note="stopped with its phase")
    if status is not None:
        row.status, row.note = "failed", f"the process ended with status {status}: {said}"
    append(lines, row)
    return True


def _process(phase: Phase, lines: Path, log: Path, limit: float, dry: bool, module: str) -> int | None:
    """Its exit status, or None when it had to be killed. It leaves no process behind."""
    left = limit - time.monotonic()
    command = [sys.executable, "-m", module, *phase.command, "--phase", phase.name, "--out", str(lines),
               "--seconds", f"{left - GRACE:.1f}", *(["--dry-run"] if dry else [])]  # fmt: skip
    with log.open("ab") as output:
        # A group of its own, not a session: whoever ends this process's session ends the phase as well.
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment(phase.environment, dry), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
        )  # fmt: skip
        try:
            return child.wait(left)
        except subprocess.TimeoutExpired:
            _signal(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            return None
        finally:
            _signal(child.pid, signal.SIGKILL)  # and whatever it started
            child.wait()


def environment(more: Mapping[str, str], dry: bool) -> dict[str, str]:
    """Of a phase's process."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **more}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found.setdefault("KINETO_LOG_LEVEL", "99")
    found.pop("TRITON_INTERPRET", None)
    if dry:
        # Tiny shapes: threads would only wait for each other.
        found.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return found


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _last(log: Path, offset: int) -> str:
    """The last line that the process wrote, which is the error of a Python process."""
    with log.open("rb") as file:
        file.seek(max(offset, log.stat().st_size - 8192))
        text = file.read().decode("utf-8", "replace")
    return next((line.strip()[:400] for line in reversed(text.splitlines()) if line.strip()), "no message")

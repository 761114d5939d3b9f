"""The lines that `scripts/gpu.sh` leaves: one JSON object a line, written as soon as something is known.

A file is one run. Of each phase it holds one `Head` (where and with what it ran), a `PhaseRow` for everything it
measured or tried, and at last one row named "phase", by the runner: how the process ended. A process that was killed
leaves what it had, so a line may be cut off; `read` says which.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.schema import Device, Time, build

SCHEMA = "opcd-fast-gpu/1"
STATUSES = ("ok", "failed", "skipped", "timeout")
PHASE = "phase"  # the name of the runner's row


@dataclass
class Value:
    value: float | None  # None: it was NaN or infinite
    unit: str  # "1" for a ratio or a count


@dataclass
class Head:
    phase: str
    date: str  # ISO 8601
    command: str
    git_commit: str | None
    git_dirty: bool | None
    device: Device
    versions: dict[str, str | None]
    environment: dict[str, str]  # the variables that change what is measured
    kind: str = "head"
    schema: str = SCHEMA


@dataclass
class PhaseRow:
    phase: str
    name: str
    status: str = "ok"
    reason: str | None = None  # why it is not ok
    seconds: float = 0.0  # that the row took, everything counted
    shape: dict[str, int] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)  # the one that matters most first
    kind: str = "row"


@dataclass
class Run:
    """What came back in one file."""

    heads: dict[str, Head] = field(default_factory=dict)  # by phase
    rows: list[PhaseRow] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)  # numbers of lines that are no whole JSON object

    def of(self, phase: str) -> list[PhaseRow]:
        return [row for row in self.rows if row.phase == phase and row.name != PHASE]

    def ends(self) -> dict[str, PhaseRow]:
        """How each phase ended, in order; one that was cut off with the whole run has no end."""
        return {row.phase: row for row in self.rows if row.name == PHASE}


def value(number: float, unit: str) -> Value:
    return Value(float(number) if math.isfinite(number) else None, unit)


def times(time: Time, name: str = "time") -> dict[str, Value]:
    """Median, least and most of a measurement, in ms."""
    return {
        name: value(time.median, "ms"),
        f"{name}_min": value(time.min, "ms"),
        f"{name}_max": value(time.max, "ms"),
        f"{name}_count": value(time.count, "1"),
    }


def append(path: Path, line: Head | PhaseRow) -> None:
    """One whole line, on the disk when this returns. A line that a killed process left open is closed first."""
    check(line)
    text = json.dumps(dataclasses.asdict(line), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Run:
    """Raises ValueError, naming the line, for a whole line that does not follow the schema."""
    if not path.exists():
        return Run()
    return parse(path.read_bytes().decode("utf-8", "replace").splitlines(), path.name)


def parse(lines: Iterable[str], source: str) -> Run:
    run, seen = Run(), set()
    for number, text in enumerate(lines, 1):
        try:
            data = json.loads(text)
        except ValueError:
            run.damaged.append(number)
            continue
        where = f"{source}, line {number}"
        if not isinstance(data, dict) or data.get("kind") not in ("head", "row"):
            raise ValueError(f"{where} is neither a head nor a row")
        line = build(Head if data["kind"] == "head" else PhaseRow, data, where)
        check(line, where)
        key = (line.phase, line.name if isinstance(line, PhaseRow) else None)
        if key in seen:
            raise ValueError(f"{where}: {' '.join(filter(None, key))} is there twice")
        seen.add(key)
        if isinstance(line, Head):
            run.heads[line.phase] = line
        else:
            run.rows.append(line)
    return run


def check(line: Head | PhaseRow, where: str = "the line") -> None:
    """Types, units' signs, and that what is not ok says why."""
    build(type(line), dataclasses.asdict(line), where)
    if isinstance(line, Head):
        if line.schema != SCHEMA:
            raise ValueError(f"{where}: schema is {line.schema!r}; this code reads {SCHEMA!r}")
        return
    if line.status not in STATUSES:
        raise ValueError(f"{where}.status is {line.status!r}; expected one of {', '.join(STATUSES)}")
    if line.status != "ok" and not line.reason:
        raise ValueError(f"{where}.reason must say why status is {line.status!r}")
    if not line.name or not line.phase:
        raise ValueError(f"{where} needs a phase and a name")
    for name, found in line.values.items():
        if not found.unit:
            raise ValueError(f"{where}.values[{name!r}] needs a unit; '1' for a ratio or a count")

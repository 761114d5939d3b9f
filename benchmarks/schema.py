"""The one schema of every result in this repository: a file of JSON lines, one object a line.

A file is one run. Of each table that it measured it holds one `Head` (where and with what), a `Row` for everything that
was measured or tried, written as soon as it is known, and at last one row named `END`: how it ended. A process that was
killed leaves what it had, so a line may be cut off; `Run.damaged` says which.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "opcd-fast-benchmark/5"
STATUSES = ("ok", "failed", "out of memory", "skipped", "timeout")
BAD = ("failed", "out of memory", "timeout")
END = "end"  # the case of a table's last row
BROKEN = 75  # exit status of a process whose CUDA context a kernel has broken; a new one may go on after that row
BOUND = "gemms"  # the bare matrix products
OURS = ("opcd_fast-triton", "opcd_fast-native", "opcd_fast-torch")  # in the order in which backend="auto" prefers


@dataclass
class Device:
    kind: str  # "cuda" or "cpu"
    name: str
    count_of_processors: int | None = None  # multiprocessors of a GPU, threads torch uses on a CPU
    memory_bytes: int | None = None
    driver: str | None = None
    cuda: str | None = None  # the CUDA version torch was built with

    @property
    def slug(self) -> str:
        """In the name of a file; every CPU is called "cpu", its model is in the file."""
        return re.sub(r"[^a-z0-9]+", "-", ("cpu" if self.kind == "cpu" else self.name).lower()).strip("-")


@dataclass
class Value:
    value: float | None = None  # None: it was NaN or infinite; of several measurements the median
    unit: str = ""  # "1" for a ratio or a count
    low: float | None = None
    high: float | None = None
    count: int | None = None  # of the measurements, or of the rows that were compared


Values = dict[str, Value]


@dataclass
class Head:
    table: str
    date: str  # ISO 8601
    command: str
    git_commit: str | None
    git_dirty: bool | None
    device: Device
    versions: dict[str, str | None]
    environment: dict[str, str] = field(default_factory=dict)  # the variables that change what is measured
    notes: list[str] = field(default_factory=list)
    schema: str = SCHEMA
    kind: str = "head"


@dataclass
class Row:
    table: str
    case: str
    implementation: str = ""
    group: str = ""  # what the case is for
    status: str = "ok"
    note: str | None = None  # why it is not ok; of an ok row, what its reader must know
    seconds: float = 0.0  # that it took, everything counted
    shape: dict[str, int] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    values: Values = field(default_factory=dict)  # the one that matters most first
    kind: str = "row"

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.case, self.implementation)))

    def get(self, name: str) -> float | None:
        """A value by its name; None where there is none."""
        found = self.values.get(name)
        return None if found is None else found.value


@dataclass
class Run:
    """What one file holds."""

    heads: dict[str, Head] = field(default_factory=dict)  # by table
    rows: list[Row] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)  # numbers of lines that are no whole JSON object

    def of(self, table: str) -> list[Row]:
        return [row for row in self.rows if row.table == table and row.case != END]

    def ends(self) -> dict[str, Row]:
        """How each table ended, in order; one that was cut off with the whole run has no end."""
        return {row.table: row for row in self.rows if row.case == END}


def value(number: float, unit: str) -> Value:
    return Value(float(number) if math.isfinite(number) else None, unit)


def end(table: str, rows: Sequence[Row], status: str = "ok", note: str | None = None, seconds: float = 0.0) -> Row:
    """The last row of a table: it says how many there are before it."""
    return Row(table, END, status=status, note=note, seconds=seconds, values={"rows": value(len(rows), "1")})


def marker(lines: Path) -> Path:
    """Where a process says which row it is at, for the case that it does not live to write it."""
    return lines.with_suffix(".row")


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return list(cases.values())


def append(path: Path, line: Head | Row) -> None:
    """One whole line, on the disk when this returns. A line that a killed process left open is closed first."""
    check(line)
    text = json.dumps(dataclasses.asdict(line, dict_factory=_without_empty), allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Run:
    """An empty run where there is no file. Raises ValueError, naming the file and the line, for a whole line that does
    not follow the schema, and for lines that are not of one run."""
    if not path.exists():
        return Run()
    run, seen = Run(), set()
    for number, text in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        try:
            data = json.loads(text)
        except ValueError:
            run.damaged.append(number)
            continue
        where = f"{path.name}, line {number}"
        line = parse(data, where)
        key = (line.table, line.name if isinstance(line, Row) else None)
        if key in seen:
            raise ValueError(f"{where}: {' '.join(filter(None, key))} is there twice")
        seen.add(key)
        if isinstance(line, Row):
            run.rows.append(line)
        elif what := difference(next(iter(run.heads.values()), line), line):
            raise ValueError(f"{where}: {what} is another than in the head before: not one run")
        else:
            run.heads[line.table] = line
    for table, last in run.ends().items():
        if not run.damaged and last.get("rows") != len(run.of(table)):
            raise ValueError(f"{path.name}: {table} has {len(run.of(table))} rows; its end says {last.get('rows'):g}")
    return run


def difference(first: Head, second: Head) -> str:
    """The field, if any, for which two heads are not of one run. Threads are part of the device."""
    fields = ("versions", "device", "git_commit")
    return next((what for what in fields if getattr(first, what) != getattr(second, what)), "")


def parse(data: Any, where: str = "the line") -> Head | Row:
    """Raises ValueError for what is no line of this schema."""
    if not isinstance(data, dict) or data.get("kind") not in ("head", "row"):
        raise ValueError(f"{where} is neither a head nor a row")
    try:
        line: Head | Row
        if data["kind"] == "head":
            line = Head(**{"git_commit": None, "git_dirty": None, **data, "device": Device(**data["device"])})
        else:
            line = Row(**{**data, "values": {name: Value(**found) for name, found in data.get("values", {}).items()}})
    except (KeyError, TypeError) as error:  # a field that is missing, or one that nobody knows
        raise ValueError(f"{where}: {error}") from None
    check(line, where)
    return line


def check(line: Head | Row, where: str = "the line") -> None:
    """Raises ValueError for the first thing that is wrong: what is not ok must say why, what is ok may hold no NaN."""
    if wrong := next(_wrong(line), None):
        raise ValueError(f"{where}: {wrong}")


def _wrong(line: Head | Row) -> Iterator[str]:
    if isinstance(line, Head):
        if line.schema != SCHEMA:
            yield f"schema is {line.schema!r}; this code reads {SCHEMA!r}"
        return
    if not line.case or not line.table:
        yield "it needs a table and a case"
    if line.status not in STATUSES:
        yield f"status is {line.status!r}; expected one of {', '.join(STATUSES)}"
    if line.status != "ok" and not line.note:
        yield f"note must say why status is {line.status!r}"
    if not all(type(size) is int and size > 0 for size in line.shape.values()):
        yield f"shape needs positive integers: {line.shape}"
    for name, found in line.values.items():
        spread = [x for x in (found.low, found.value, found.high) if x is not None]
        if not all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in spread):
            yield f"values[{name!r}] is not finite and not negative: {spread}"
        if spread != sorted(spread):
            yield f"values[{name!r}] is not low <= value <= high: {spread}"
        if not found.unit:
            yield f"values[{name!r}] needs a unit; '1' for a ratio or a count"
        if found.value is None and line.status == "ok":
            yield f"values[{name!r}] is NaN although status is 'ok'"


def _without_empty(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: found for name, found in fields if found not in (None, [], {})}

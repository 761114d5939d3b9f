"""The one JSON schema of every benchmark result in this repository.

A file is one `Report`: where it was measured, with what, and one `Row` per (case, implementation) of the loss,
one `TeacherRow` of the teacher, or one `StepRow` of whole training steps. It is written again after every case, so a
run that is killed leaves what it had, with `complete` false.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "opcd-fast-benchmark/4"
FIRST_SCHEMA = "opcd-fast-benchmark/1"  # had neither groups nor a workspace; still read
SECOND_SCHEMA = "opcd-fast-benchmark/2"  # had no rows of the teacher; still read
THIRD_SCHEMA = "opcd-fast-benchmark/3"  # had no rows of whole steps; still read
GROUPS = ("main", "accuracy", "N", "V", "D", "workspace")
TIMED_TEACHER_GROUPS = ("main", "context", "response", "batch", "flex")
TEACHER_GROUPS = (*TIMED_TEACHER_GROUPS, "check")
STEP_GROUPS = ("main", "dtype", "checkpointing")
BOUND = "gemms"  # the bare matrix products
OURS = ("opcd_fast-triton", "opcd_fast-native", "opcd_fast-torch")  # in the order in which backend="auto" prefers
STATUSES = ("ok", "out of memory", "failed", "skipped")


@dataclass
class Device:
    kind: str  # "cuda" or "cpu"
    name: str
    count_of_processors: int | None  # multiprocessors of a GPU, threads torch uses on a CPU
    memory_bytes: int | None
    driver: str | None
    cuda: str | None  # the CUDA version torch was built with
    # Measured in the same run, so that rows can be compared across cards; None where they were not.
    matmul_flops_per_second: float | None = None  # one large bf16 product of random data
    copy_bytes_per_second: float | None = None  # a large device-to-device copy, bytes read plus written


@dataclass
class Time:
    """Milliseconds of one call."""

    median: float
    min: float
    max: float
    count: int


@dataclass
class GradientError:
    """||dL/dx - reference|| / ||reference||, the reference in float64 from the same inputs."""

    mean_kl: float  # of the rows compared, from the reference
    relative_error: float | None  # None: the gradient held NaN or infinities
    rows: int
    of: str = "hidden"  # x: the student's hidden states, or "weight" for its head


@dataclass
class Row:
    case: str
    implementation: str
    N: int
    V: int
    D: int
    dtype: str
    frozen: bool  # True: the head gets no gradient (3 GEMMs instead of 4)
    group: str = "main"  # what the case is for: one of GROUPS
    workspace_bytes: int | None = None  # given to ours; None: its default
    status: str = "ok"
    exact: bool = True  # False: known not to compute the exact gradient; its time is no fair comparison
    time_ms: Time | None = None
    peak_bytes: int | None = None  # above what was allocated before the call; gradients included
    gradient_error: list[GradientError] = field(default_factory=list)
    bound_fraction: float | None = None  # time of the bare GEMMs of the same case / time
    note: str | None = None  # why something is missing


@dataclass
class TeacherRow:
    """Hidden states of `batch` answers of `response` tokens each, after one context of `context` tokens."""

    case: str
    implementation: str
    model: str  # whose shape; weights are random unless the report's notes say otherwise
    layers: int
    context: int
    response: int
    batch: int
    dtype: str
    group: str = "main"  # what the case is for: one of TEACHER_GROUPS
    status: str = "ok"
    time_ms: Time | None = None
    peak_bytes: int | None = None  # above what was allocated before the call; the hidden states included
    prefix_bytes: int | None = None  # the context's keys and values during a call, all layers; 0: never held together
    one_prefix_bytes: int | None = None  # the same for batch size 1, from the model's shape
    max_error: float | None = None  # largest |difference| from the hidden states of `concat` in float32
    flops: float | None = None  # what the call must compute, see teacher_model.py
    limit_ms: float | None = None  # flops at the rate of bare matrix products, measured in the same run
    sequences_at_once: int | None = None  # fewer than `batch` where all of them do not fit
    note: str | None = None  # why something is missing


@dataclass
class StepRow:
    """Whole optimizer steps of a trainer: `prompts` fresh answers, both models' forwards, backward and update."""

    case: str
    implementation: str
    model: str  # whose shape; weights are random unless the report's notes say otherwise
    prompts: int
    tokens: int  # longest answer
    context: int  # tokens of the context in the teacher's input, as ours renders it
    dtype: str
    checkpointing: bool  # of the student's activations
    group: str = "main"  # what the case is for: one of STEP_GROUPS
    status: str = "ok"
    time_ms: Time | None = None  # of a step; the first one of each process is left out
    answer_tokens: float | None = None  # scored and trained on in a step, mean over the timed steps
    peak_bytes: int | None = None  # of a run, above what was held once the model was loaded
    parts_ms: dict[str, float] = field(default_factory=dict)  # of a step, mean, where the trainer tells
    note: str | None = None  # why something is missing


@dataclass
class Report:
    benchmark: str
    date: str  # ISO 8601
    command: str
    git_commit: str | None
    git_dirty: bool | None
    device: Device
    versions: dict[str, str | None]
    schema: str = SCHEMA
    notes: list[str] = field(default_factory=list)
    complete: bool = False
    rows: list[Row] = field(default_factory=list)
    teacher: list[TeacherRow] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)

    def validate(self) -> None:
        """Raise ValueError naming the first field that a reader could trip over."""
        from_json(dataclasses.asdict(self))

    def write(self, path: Path) -> None:
        """Validate, then replace the file in one step: a reader or a kill never sees half of it."""
        self.validate()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n")
        os.replace(partial, path)

    def file_name(self) -> str:
        """<benchmark>_<device>_<date>.json; every CPU is called "cpu", its model is in the file."""
        device = "cpu" if self.device.kind == "cpu" else self.device.name
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        return f"{self.benchmark}_{slug}_{self.date[:10]}.json"


def select(cases: Iterable[Any], groups: Sequence[str], possible: Sequence[str]) -> list[Any]:
    """The cases of these groups, all of them if none is named. Raises ValueError for a name that is no group."""
    wrong = sorted(set(groups) - set(possible))
    if wrong:
        raise ValueError(f"unknown group {wrong[0]!r}; expected one of {', '.join(possible)}")
    return [case for case in cases if not groups or case.group in groups]


def read(path: Path) -> Report:
    """The report in a file. Raises ValueError, naming the file and the field, when it is not one."""
    try:
        return from_json(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def from_json(data: Any) -> Report:
    """Build and check a report from parsed JSON: names, types, units' signs and the links between fields.

    A file of an older schema is read as one of this schema: what it did not have has its default.
    """
    if isinstance(data, dict) and data.get("schema") in (FIRST_SCHEMA, SECOND_SCHEMA, THIRD_SCHEMA):
        data = {**data, "schema": SCHEMA}
    report: Report = build(Report, data, "report")
    if report.schema != SCHEMA:
        raise ValueError(f"schema is {report.schema!r}; this code reads {SCHEMA!r}")
    for index, row in enumerate(report.rows):
        _check_loss(row, f"report.rows[{index}]")
    for index, teacher_row in enumerate(report.teacher):
        _check_teacher(teacher_row, f"report.teacher[{index}]")
    for index, step_row in enumerate(report.steps):
        _check_step(step_row, f"report.steps[{index}]")
    every: dict[str, Any] = {"rows": report.rows, "teacher": report.teacher, "steps": report.steps}
    for name, rows in every.items():
        seen = set()
        for index, row in enumerate(rows):
            where = f"report.{name}[{index}]"
            _check_common(row, where)
            if (row.case, row.implementation) in seen:
                raise ValueError(f"{where}: {row.implementation} appears twice in case {row.case}")
            seen.add((row.case, row.implementation))
    return report


def _check_loss(row: Row, where: str) -> None:
    if min(row.N, row.V, row.D) < 1:
        raise ValueError(f"{where}: N, V and D must be positive, got {row.N}, {row.V}, {row.D}")
    if row.group not in GROUPS:
        raise ValueError(f"{where}.group is {row.group!r}; expected one of {', '.join(GROUPS)}")
    for error in row.gradient_error:
        if error.of not in ("hidden", "weight"):
            raise ValueError(f"{where}.gradient_error is of {error.of!r}; expected 'hidden' or 'weight'")
    if row.status == "ok" and row.time_ms is None and row.group != "accuracy":
        raise ValueError(f"{where}.time_ms is missing although status is 'ok'")


def _check_teacher(row: TeacherRow, where: str) -> None:
    if min(row.layers, row.context, row.response, row.batch) < 1:
        raise ValueError(f"{where}: layers, context, response and batch must be positive")
    if row.group not in TEACHER_GROUPS:
        raise ValueError(f"{where}.group is {row.group!r}; expected one of {', '.join(TEACHER_GROUPS)}")
    if row.status == "ok" and row.time_ms is None:
        raise ValueError(f"{where}.time_ms is missing although status is 'ok'")
    if row.status == "ok" and row.max_error is None and not row.note:
        raise ValueError(f"{where}.note must say why max_error is missing")


def _check_step(row: StepRow, where: str) -> None:
    if min(row.prompts, row.tokens, row.context) < 1:
        raise ValueError(f"{where}: prompts, tokens and context must be positive")
    if row.group not in STEP_GROUPS:
        raise ValueError(f"{where}.group is {row.group!r}; expected one of {', '.join(STEP_GROUPS)}")
    if row.status == "ok" and (row.time_ms is None or not row.answer_tokens):
        raise ValueError(f"{where}.time_ms or answer_tokens is missing although status is 'ok'")


def _check_common(row: Row | TeacherRow | StepRow, where: str) -> None:
    if row.status not in STATUSES:
        raise ValueError(f"{where}.status is {row.status!r}; expected one of {', '.join(STATUSES)}")
    if row.status != "ok" and not row.note:
        raise ValueError(f"{where}.note must say why status is {row.status!r}")
    if row.time_ms is not None and not 0 < row.time_ms.min <= row.time_ms.median <= row.time_ms.max:
        raise ValueError(f"{where}.time_ms is not 0 < min <= median <= max: {row.time_ms}")
    if row.peak_bytes is None and row.status == "ok" and not row.note:
        raise ValueError(f"{where}.note must say why peak_bytes is missing")


def build(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a {type(data).__name__}; expected an object")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ValueError(f"{where} has unknown field {unknown[0]!r}")
    required = (
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(f"{where}.{missing[0]} is missing")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(key): _value(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{where} is {value}; expected a finite number that is not negative")
        return float(value)
    if hint is int and number and isinstance(value, int):
        if value < 0:
            raise ValueError(f"{where} is {value}; expected an integer that is not negative")
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ValueError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")

"""The one runner: what a benchmark writes its rows with, each guarded, timed and on the disk as soon as it is known.

`row` is for what stands alone, `compare` for contenders that do the same work. Tables, the phases of a GPU run and
pytest's benchmarks measure through it.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.measure import clocked, interleaved, release, wait, with_peak
from benchmarks.schema import BAD, BOUND, BROKEN, Head, Row, Value, Values, append, difference, end, marker, read, value

SLOW_MS = {"cpu": 5_000.0, "cuda": 1_000.0}  # timed no more than twice; on a GPU the first call is the time


class Failed(Exception):
    """A row that is not ok: its status, the reason, and the values that it keeps."""

    def __init__(self, status: str, reason: str, values: Values | None = None) -> None:
        super().__init__(reason)
        self.status, self.values = status, values or {}


class Skip(Failed):
    """Nothing to measure here; the message is the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__("skipped", reason)


class Wrong(Failed):
    """What was measured must not be so; the row fails and keeps its values."""

    def __init__(self, reason: str, values: Values) -> None:
        super().__init__("failed", reason, values)


def in_groups(cases: Sequence[Any], groups: Sequence[str]) -> list[Any]:
    """The cases of these groups, all of them if none is named. Raises ValueError for a name that is no group."""
    possible = list(dict.fromkeys(case.group for case in cases))
    if wrong := [group for group in groups if group not in possible]:
        raise ValueError(f"groups: {wrong[0]!r} is none of {', '.join(possible)}")
    return [case for case in cases if not groups or case.group in groups]


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to do what a case asks for."""

    name: str
    build: Callable[[], Callable[[], Any]]  # makes the call that is timed; either raises Skip where it cannot run
    judge: Callable[[Any], Values] | None = None  # values of a call's result; raises Wrong
    note: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    warm: Callable[[], Any] | None = None  # a shorter call that compiles what the call needs
    compiles: bool = False  # its first call compiles for long: no part of its memory, and not done in a dry run
    has_peak: bool = True  # False: it is of no interest, or its buffers are made beforehand

    @property
    def ours(self) -> bool:
        return self.name.startswith("opcd_fast")


def _of_bound(row: Row, bound: Row) -> Value:
    """The time for what a row must compute at the rate of the bare products, or for these where nobody counts its
    FLOPs, over the row's time."""
    mine, theirs = row.get("flops"), bound.get("flops")
    work = mine / theirs if mine and theirs else 1.0
    return value(work * (bound.get("time") or 0.0) / (row.get("time") or 1.0), "1")


class Session:
    """One table's share of a run: its device, its time and its rows.

    Rows that are in the file already are not measured again: after a broken context or a kill the table is started
    anew, and goes on behind them. Raises ValueError where the file is of another run: other versions, device or commit.
    """

    def __init__(
        self, table: str, out: Path, *, device: torch.device, dry: bool = False, seconds: float = 1e6,
        command: str = "", notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.table, self.out, self.device, self.dry = table, out, device, dry
        self.folder = out.parent
        self._end = time.monotonic() + seconds
        run = read(out)
        self._done = {row.name: row for row in run.of(table)}
        head = environment.head(table, device, command, list(notes))
        if what := next((found for earlier in run.heads.values() if (found := difference(earlier, head))), ""):
            raise ValueError(f"{out.name} is of another run, its {what} differ; delete it or give another folder")
        if table not in run.heads:
            append(out, head)

    @property
    def rows(self) -> list[Row]:
        return list(self._done.values())

    def head(self) -> Head:
        """Where and with what this table runs."""
        return read(self.out).heads[self.table]

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def on_device(self, what: str) -> None:
        """Skip the row where there is no CUDA device."""
        if self.device.type != "cuda":
            raise Skip(f"{what} needs a CUDA device")

    # ----------------------------------------------------------------------------------------------- measuring

    def row(
        self, name: str, measure: Callable[[], Values], *, shape: Mapping[str, int] | None = None,
        settings: Mapping[str, object] | None = None, group: str = "", needs: float = 0.0, of: str = "",
    ) -> Values | None:  # fmt: skip
        """Measure and write; what was measured, or None where that did not work.

        settings: `measure` may still fill them. needs: seconds; with fewer left the row is skipped. of: the
        implementation, where several have a row of that name.
        """
        row = Row(self.table, name, of, group, shape=dict(shape or {}))
        if (name := row.name) not in self._done:
            self.tried(row, lambda: row.values.update(measure()), needs)
            row.settings = {key: str(found) for key, found in (settings or {}).items()}
            self.write(row)
        done = self._done[name]
        return done.values if done.status == "ok" else None

    def compare(
        self, case: str, contenders: Sequence[Contender], *, shape: Mapping[str, int], settings: Mapping[str, str],
        group: str = "main", seconds: float | None = 8.0, min_rounds: int = 3, needs: float = 3.0,
        only: Sequence[str] = (),
    ) -> dict[str, Row]:  # fmt: skip
        """A row for each contender: first one call of each, its peak memory and what `judge` says of it, then the
        interleaved times.

        seconds: of timing; None: nothing is timed. only: names of contenders; default: all of them.
        """
        rows: dict[str, Row] = {}
        calls: dict[str, Callable[[], Any]] = {}
        first_ms: dict[str, float] = {}
        for one in (one for one in contenders if not only or one.name in only):
            row = Row(self.table, case, one.name, group, note=one.note, shape=dict(shape),
                      settings={**settings, **one.settings})  # fmt: skip
            rows[one.name] = self._done.get(row.name, row)
            if row.name in self._done:
                continue
            if self.dry and one.compiles:
                row.status, row.note = "skipped", "nothing is compiled in a dry run"
                continue
            call = self.tried(row, partial(self._first, one, row, first_ms), needs)
            if call is not None:
                calls[one.name] = call
            release(self.device)
        if seconds is not None:
            self._time(rows, calls, first_ms, seconds, min_rounds)
        for row in rows.values():
            if BOUND in rows and "time" in row.values and "time" in rows[BOUND].values:
                row.values["of_bound"] = _of_bound(row, rows[BOUND])
            self.write(row)
        return rows

    def _first(self, one: Contender, row: Row, first_ms: dict[str, float]) -> Callable[[], Any]:
        """The call that will be timed, after one that was not."""
        call = one.build()
        if self.device.type == "cuda" or one.compiles:  # kernels are compiled and handles made beforehand
            (one.warm or call)()
            wait(self.device)

        def once() -> Any:
            begin = time.perf_counter()
            result = call()
            wait(self.device)
            first_ms[one.name] = 1e3 * (time.perf_counter() - begin)
            return result

        result, peak = with_peak(once, self.device) if one.has_peak else (once(), None)
        if one.judge is not None:
            row.values.update(one.judge(result))
        if peak is not None:
            row.values["peak"] = value(peak, "bytes")
        return call

    def _time(
        self, rows: dict[str, Row], calls: dict[str, Any], first_ms: dict[str, float], seconds: float, min_rounds: int
    ) -> None:
        def sample(name: str) -> list[float] | None:
            """A contender that breaks the device breaks it in its own row; the others of the case start anew."""
            return self.guarded(rows[name], lambda: [clocked(calls[name], self.device)])

        times = 0 if self.device.type == "cuda" else 2
        slow = {name: times for name in calls if first_ms[name] > SLOW_MS[self.device.type]}
        begin = time.monotonic()
        found = interleaved({name: partial(sample, name) for name in calls}, seconds=seconds, min_rounds=min_rounds,
                            at_most=slow, left=self.left())  # fmt: skip
        for name in calls:
            row = rows[name]
            row.seconds += (time.monotonic() - begin) / len(calls)
            if row.status == "ok":
                row.values = {"time": found.get(name) or Value(first_ms[name], "ms", count=1), **row.values}

    # ------------------------------------------------------------------------------------ whatever goes wrong

    def tried(self, row: Row, measure: Callable[[], Any], needs: float = 0.0) -> Any:
        """What `measure` returns, or None; the row says why, and how long it took."""
        begin = time.monotonic()
        if self.left() < needs:
            row.status, row.note = "skipped", f"{max(0.0, self.left()):.0f} s were left, it takes {needs:.0f}"
            return None
        found = self.guarded(row, measure)
        row.seconds += time.monotonic() - begin
        return found

    def guarded(self, row: Row, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, or None; the row says why. Ends the process where no further call can succeed."""
        self.mark(row.name)
        try:
            found = measure()
            wait(self.device)
            return found
        except Failed as failed:
            row.status, row.note = failed.status, str(failed)
            row.values.update(failed.values)
        except Exception as error:  # noqa: BLE001 - a kernel that does not compile is a row, not the end
            traceback.print_exc()
            text = " ".join(str(error).split())
            out = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
            row.status = "out of memory" if out else "failed"
            row.note = f"{type(error).__name__}: {text}"[:400]
        # After the handlers, so that the traceback's frames no longer hold the tensors that did not fit.
        if row.status in BAD and self.broken():
            row.note = f"{row.note}; the CUDA context is broken"
            self.write(row)
            sys.exit(BROKEN)
        return None

    def broken(self) -> bool:
        """Whether no further call can succeed in this process."""
        try:
            wait(self.device)
            release(self.device)
            torch.ones(8, device=self.device).sum().item()
        except Exception:  # noqa: BLE001
            return True
        return False

    def mark(self, name: str) -> None:
        """This row is being measured: should the process die of it, the runner writes it, and starts behind it."""
        marker(self.out).write_text(name)

    def write(self, row: Row) -> None:
        """One of the same name is kept. What is NaN is no result."""
        if row.name not in self._done:
            if row.status == "ok" and (bad := [name for name, found in row.values.items() if found.value is None]):
                row.status, row.note = "failed", f"{bad[0]} is NaN or infinite"
            append(self.out, row)
            self._done[row.name] = row
            first = next(iter(row.values.values()), None)
            told = "" if first is None or first.value is None else f"{first.value:.4g} {first.unit}"
            print(f"{row.table} {row.name}: {row.status} {told} {row.note or ''}".rstrip(), flush=True)
        marker(self.out).unlink(missing_ok=True)

    def finish(self) -> None:
        append(self.out, end(self.table, self.rows))

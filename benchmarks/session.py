"""The one runner: what a table writes its rows with, each guarded, timed and on the disk as soon as it is known.

`row` is for what stands alone, `compare` for contenders that do the same work. Tables on a CPU, the phases of a GPU run
and pytest's benchmarks measure through it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.measure import Failure, attempt, in_process, interleaved, release, wait, with_peak
from benchmarks.schema import BAD, BOUND, BROKEN, Head, Row, Value, Values, append, difference, end, marker, read, value

SLOW_MS = {"cpu": 5_000.0, "cuda": 1_000.0}  # timed no more than twice; on a GPU the first call is the time
VARIABLES = (
    "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CUDNN_SDPA_DEPRIORITIZED", "TRITON_INTERPRET", "OPCD_LAUNCH_SHAPES",
    "OMP_NUM_THREADS",
)  # fmt: skip


class Skip(Exception):
    """Nothing to measure here; the message is the reason."""


class Wrong(Exception):
    """What was measured must not be so; the row fails and keeps its values."""

    def __init__(self, reason: str, values: Values) -> None:
        super().__init__(reason)
        self.values = values


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to do what a case asks for."""

    name: str
    build: Callable[[], Callable[[], Any]]  # makes the call that is timed
    judge: Callable[[Any], Values] | None = None  # values of a call's result; raises Wrong
    skip: str | None = None  # why it cannot run here
    note: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    warm: Callable[[], Any] | None = None  # a shorter call that compiles what the call needs
    compiles: bool = False  # its first call on a CPU compiles, whose memory is no part of the call's
    has_peak: bool = True  # False: it is of no interest, or its buffers are made beforehand

    @property
    def ours(self) -> bool:
        return self.name.startswith("opcd_fast")


class Session:
    """One table's share of a run: its device, its time and its rows.

    Rows that are in the file already are not measured again: after a broken context or a kill the table is started
    anew, and goes on behind them. Raises ValueError where the file is of another run: other versions, device or commit.
    """

    def __init__(
        self,
        table: str,
        out: Path,
        *,
        device: torch.device,
        dry: bool = False,
        seconds: float = float("inf"),
        command: str = "",
        notes: Sequence[str] = (),
        ceilings: bool = False,
    ) -> None:
        self.table, self.out, self.device, self.dry = table, out, device, dry
        self.folder = out.parent
        self._end = time.monotonic() + seconds
        run = read(out)
        self._done = {row.name: row for row in run.of(table)}
        commit, dirty = environment.git_state()
        head = Head(
            table, datetime.now(timezone.utc).isoformat(timespec="seconds"), command, commit, dirty,
            environment.describe(device, ceilings=ceilings and table not in run.heads), environment.versions(),
            {name: os.environ[name] for name in VARIABLES if name in os.environ}, list(notes),
        )  # fmt: skip
        if what := next((found for earlier in run.heads.values() if (found := difference(earlier, head))), ""):
            raise ValueError(f"{out.name} is of another run, its {what} differ; delete it or give another folder")
        if table not in run.heads:
            append(out, head)

    @property
    def rows(self) -> list[Row]:
        return list(self._done.values())

    @property
    def names(self) -> set[str]:
        return set(self._done)

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

    def row(
        self,
        name: str,
        measure: Callable[[], Values],
        *,
        shape: Mapping[str, int] | None = None,
        settings: Mapping[str, object] | None = None,
        group: str = "",
        needs: float = 0.0,
    ) -> Values | None:
        """Measure and write; what was measured, or None where that did not work.

        settings: `measure` may still fill them. needs: seconds; with fewer left the row is skipped.
        """
        if name in self._done:
            earlier = self._done[name]
            return earlier.values if earlier.status == "ok" else None
        row = Row(self.table, name, group=group, shape=dict(shape or {}))
        begin = time.monotonic()
        if self.enough(row, needs):
            self.guarded(row, lambda: row.values.update(measure()))
        row.seconds = time.monotonic() - begin
        row.settings = {key: str(found) for key, found in (settings or {}).items()}
        self.write(row)
        return row.values if row.status == "ok" else None

    def compare(
        self,
        case: str,
        contenders: Sequence[Contender],
        *,
        shape: Mapping[str, int],
        settings: Mapping[str, str],
        group: str = "main",
        seconds: float | None = 8.0,
        min_rounds: int = 3,
        needs: float = 0.0,
        derive: Callable[[Row, Row], Values] | None = None,
    ) -> dict[str, Row]:
        """A row for each contender: first one call of each, its peak memory and what `judge` says of it, then the
        interleaved times.

        seconds: of timing; None: nothing is timed. derive: values of an ok row that follow from it and the bound's row.
        """
        rows, live = {}, {}
        first_ms: dict[str, float] = {}
        for one in contenders:
            row = Row(self.table, case, one.name, group, note=one.note, shape=dict(shape),
                      settings={**settings, **one.settings})  # fmt: skip
            rows[one.name] = self._done.get(row.name, row)
            if rows[one.name] is not row:
                continue
            begin = time.monotonic()
            if one.skip:
                row.status, row.note = "skipped", one.skip
            elif self.enough(row, needs):
                call = self.guarded(row, lambda one=one, row=row: self._first(one, row, first_ms))
                if call is not None:
                    live[one.name] = call
            row.seconds = time.monotonic() - begin
            release(self.device)
        if seconds is not None:
            self._time(rows, live, first_ms, seconds, min_rounds)
        bound = rows.get(BOUND)
        for row in rows.values():
            if derive is not None and bound is not None and row.status == bound.status == "ok":
                row.values.update(derive(row, bound))
            if row.name not in self._done:
                self.write(row)
        return rows

    def _first(self, one: Contender, row: Row, first_ms: dict[str, float]) -> Callable[[], Any]:
        """The call that will be timed, after one that was not."""
        call = one.build()
        if self.device.type == "cuda" or one.compiles:  # kernels are compiled and handles made beforehand
            (one.warm or call)()
            wait(self.device)

        def clocked() -> Any:
            begin = time.perf_counter()
            result = call()
            wait(self.device)
            first_ms[one.name] = 1e3 * (time.perf_counter() - begin)
            return result

        result, peak = with_peak(clocked, self.device) if one.has_peak else (clocked(), None)
        if one.judge is not None:
            row.values.update(one.judge(result))
        if peak is not None:
            row.values["peak"] = value(peak, "bytes")
        return call

    def _time(
        self, rows: dict[str, Row], live: dict[str, Any], first_ms: dict[str, float], seconds: float, min_rounds: int
    ) -> None:
        times = 0 if self.device.type == "cuda" else 2
        slow = {name: times for name in live if first_ms[name] > SLOW_MS[self.device.type]}
        begin = time.monotonic()
        found = interleaved(
            {name: self.marked(rows[name], in_process(call, self.device)) for name, call in live.items()},
            seconds=seconds, min_rounds=min_rounds, at_most=slow, left=self.left(),
        )  # fmt: skip
        for name in live:
            row, outcome = rows[name], found.get(name)
            row.seconds += (time.monotonic() - begin) / len(live)
            if isinstance(outcome, Failure):
                row.status, row.note = outcome.status, outcome.note
            else:
                row.values = {"time": outcome or Value(first_ms[name], "ms", count=1), **row.values}

    def marked(self, row: Row, sample: Callable[[], Any]) -> Callable[[], Any]:
        """What this contender breaks is written down as its own; the others of its case start anew."""

        def sampled() -> Any:
            self.mark(row.name)
            outcome = sample()
            if isinstance(outcome, Failure) and self.broken():
                row.status, row.note = outcome.status, outcome.note
                self._end_broken(row)
            return outcome

        return sampled

    def enough(self, row: Row, needs: float) -> bool:
        """Whether there is time; if not, the row says so."""
        if self.left() >= needs:
            return True
        row.status, row.note = "skipped", f"{max(0.0, self.left()):.0f} s were left, it takes {needs:.0f}"
        return False

    def guarded(self, row: Row, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, or None; the row says why."""
        self.mark(row.name)

        def call() -> Any:
            try:
                return measure()
            except Skip as reason:
                row.status, row.note = "skipped", str(reason)
            except Wrong as wrong:
                row.status, row.note = "failed", str(wrong)
                row.values.update(wrong.values)
            except Exception:
                traceback.print_exc()
                raise
            return None

        outcome = attempt(call, self.device)
        if isinstance(outcome, Failure):
            row.status, row.note = outcome.status, outcome.note
        if row.status in BAD and self.broken():
            self._end_broken(row)
        return outcome if row.status == "ok" else None

    def _end_broken(self, row: Row) -> None:
        row.note = f"{row.note}; the CUDA context is broken"
        self.write(row)
        sys.exit(BROKEN)

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

    def mark(self, name: str) -> None:
        """This row is being measured: should the process die of it, the runner writes it, and starts behind it."""
        marker(self.out).write_text(name)

    def broken(self) -> bool:
        """Whether no further call can succeed in this process."""
        try:
            wait(self.device)
            if self.device.type == "cuda":
                torch.ones(8, device=self.device).sum().item()
        except Exception:  # noqa: BLE001
            return True
        with contextlib.suppress(RuntimeError):
            release(self.device)
        return False


def error_row(error: float, bound: float, what: str = "relative error") -> Values:
    """The values of a comparison. Raises Wrong above the bound, and for NaN."""
    values = {"error": value(error, "1"), "bound": value(bound, "1")}
    if not error <= bound:
        raise Wrong(f"{what} {error:.2e} is above {bound:.1e}", values)
    return values

"""What a phase writes its rows with: each is guarded, timed and on the disk before the next one starts."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.measure import release, wait
from benchmarks.phase_rows import Head, PhaseRow, Value, append, read, value

Values = dict[str, Value]
BROKEN = 75  # exit status: a kernel has broken the CUDA context, and a new process may go on after that row
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


class Session:
    """One phase's share of a run: its device, its time and its rows.

    Rows that are in the file already are not measured again: after a broken context the runner starts the phase anew,
    and it goes on behind the row that broke it.
    """

    def __init__(self, phase: str, out: Path, *, dry: bool, seconds: float, command: str) -> None:
        self.phase, self.out, self.dry = phase, out, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.folder = out.parent
        self._end = time.monotonic() + seconds
        run = read(out)
        self._done = {row.name: row for row in run.of(phase)}
        if phase not in run.heads:
            commit, dirty = environment.git_state()
            append(out, Head(
                phase, datetime.now(timezone.utc).isoformat(timespec="seconds"), command, commit, dirty,
                environment.describe(self.device, ceilings=False), environment.versions(),
                {name: os.environ[name] for name in VARIABLES if name in os.environ},
            ))  # fmt: skip

    def head(self) -> Head:
        """Where and with what this phase runs."""
        return read(self.out).heads[self.phase]

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
        needs: float = 0.0,
    ) -> Values | None:
        """Measure and write; what was measured, or None where that did not work.

        settings: `measure` may still fill them. needs: seconds; with fewer left the row is skipped.
        """
        if name in self._done:
            earlier = self._done[name]
            return earlier.values if earlier.status == "ok" else None
        row = PhaseRow(self.phase, name, shape=dict(shape or {}))
        begin, broken = time.monotonic(), False
        if self.left() < needs:
            row.status, row.reason = "skipped", f"{max(0.0, self.left()):.0f} s were left, it takes {needs:.0f}"
        else:
            self._attempt(row, measure)
            # After the handler, so that a traceback's frames no longer hold tensors that did not fit.
            broken = row.status == "failed" and self.broken()
        row.seconds = time.monotonic() - begin
        row.settings = {key: str(found) for key, found in (settings or {}).items()}
        if broken:
            row.reason = f"{row.reason}; the CUDA context is broken"
        append(self.out, row)
        self._done[name] = row
        print(f"{self.phase} {name}: {row.status} {row.seconds:.1f} s {row.reason or ''}", flush=True)
        if broken:
            sys.exit(BROKEN)
        return row.values if row.status == "ok" else None

    def done(self, name: str) -> bool:
        return name in self._done

    def note(self, name: str, status: str, reason: str | None, values: Values) -> None:
        """A row of something that was measured elsewhere; one of the same name is kept."""
        if name not in self._done:
            self._done[name] = PhaseRow(self.phase, name, status, reason, values=values)
            append(self.out, self._done[name])

    def _attempt(self, row: PhaseRow, measure: Callable[[], Values]) -> None:
        try:
            row.values = measure()
            wait(self.device)
        except Skip as reason:
            row.status, row.reason = "skipped", str(reason)
        except Wrong as wrong:
            row.status, row.reason, row.values = "failed", str(wrong), wrong.values
        except Exception as error:  # noqa: BLE001 - nothing may end the phase but time and a broken context
            text = " ".join(str(error).split())[:600]
            row.status, row.reason = "failed", f"{type(error).__name__}: {text} ({_place(error)})"
            traceback.print_exc()

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


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"

"""What a person sees while a run goes on: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Shows step, KL, tokens per second and time left.

    Args:
        total: steps of the run.
        done: steps already behind it (a resumed run).
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int = 0, quiet: bool = False) -> None:
        self._total, self._done, self._quiet = total, done, quiet
        self._start = time.perf_counter()
        self._first = done
        self._bar: Any = None
        self._task: Any = None
        if not quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=30),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=total, completed=done, loss="-", speed="-")
            self._bar.start()

    def step(self, loss: float, tokens_per_second: float) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, loss=f"{loss:.4f}", speed=f"{tokens_per_second:.0f}")
        elif not self._quiet:
            spent = time.perf_counter() - self._start
            left = spent / (self._done - self._first) * (self._total - self._done)
            speed = f"{tokens_per_second:.0f} tokens/s"
            print(
                f"step {self._done}/{self._total}  loss {loss:.4f}  {speed}  {_clock(left)} left",
                flush=True,
            )

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

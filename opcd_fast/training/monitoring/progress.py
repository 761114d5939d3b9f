"""What a person sees while a run goes on: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opcd_fast.training.settings import OPCDConfig


class Progress:
    """Shows step, loss, KL, tokens per second, seconds by part, time left and held-out KL.

    Args:
        total: steps of the run.
        done: steps already behind it (a resumed run).
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int = 0, quiet: bool = False) -> None:
        self._total, self._done, self._quiet = total, done, quiet
        self._times: list[float] = [time.perf_counter()]
        self._held_out = ""
        self._last: Mapping[str, Any] | None = None  # step
        self._live: Any = None
        if not quiet and sys.stdout.isatty():
            from rich.live import Live
            from rich.progress import BarColumn, MofNCompleteColumn
            from rich.progress import Progress as Bar

            columns = "step", MofNCompleteColumn(), BarColumn(bar_width=30), "{task.fields[left]}"
            self._bar = Bar(*columns, auto_refresh=False)
            self._task = self._bar.add_task("", total=total, completed=done, left="")
            self._live = Live(self._bar, refresh_per_second=4)
            self._live.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """record: of one step, see `opcd_fast.training.step.records.step_record`."""
        self._done += 1
        self._times.append(time.perf_counter())
        waiting = f"{clock(self._seconds_left(record))} left"
        self._last = record
        if self._live is not None:
            self._bar.update(self._task, completed=self._done, left=waiting)
            self._draw()
        elif not self._quiet:
            name, value = per_token(record)
            print(
                f"step {self._done}/{self._total}  loss {record['loss']:.4f}  {name} {value:.4f}  "
                f"{record['tokens_per_second']:.0f} tokens/s  {waiting}", flush=True,
            )  # fmt: skip

    def _seconds_left(self, record: Mapping[str, Any]) -> float:
        """From the steps after the first, which also compiles, evaluations included; at first from its parts alone."""
        later = len(self._times) - 2
        took = (self._times[-1] - self._times[1]) / later if later else sum(record["seconds"].values())
        return took * (self._total - self._done)

    def evaluation(self, text: str, record: Mapping[str, Any]) -> None:
        """text: in one line. record: of one held-out evaluation."""
        self._held_out = f"{record['own_kl']:.4f} after step {record['step']}"
        self.note(text)
        self._draw()  # which may be the last time

    def _draw(self) -> None:
        if self._live is not None and self._last is not None:
            from rich.console import Group

            self._live.update(Group(self._bar, self._table(self._last)))

    def note(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(text, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self, record: Mapping[str, Any]) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="dim")
        table.add_column()
        table.add_row("loss", f"{record['loss']:.4f}")
        name, value = per_token(record)
        table.add_row(f"{name} per token", f"{value:.4f} nats")
        if self._held_out:
            table.add_row("held-out KL", self._held_out)
        table.add_row("speed", f"{record['tokens_per_second']:.0f} tokens/s")
        table.add_row("seconds", "  ".join(f"{part} {value:.2f}" for part, value in record["seconds"].items()))
        return table


def per_token(record: Mapping[str, Any]) -> tuple[str, float]:
    """A step's measure per token, by name: the KL, or the NLL where no teacher scored the answers."""
    return ("KL", record["kl_per_token"]) if "kl_per_token" in record else ("NLL", record["nll_per_token"])


def seconds_by_part(history: Sequence[Mapping[str, Any]]) -> str:
    """Mean seconds of a step and of its parts, with shares: one line."""
    parts = {part: sum(r["seconds"].get(part, 0.0) for r in history) for part in history[-1]["seconds"]}
    total = sum(parts.values()) or 1.0
    words = (f"{part} {spent / len(history):.2f} ({spent / total:.0%})" for part, spent in parts.items())
    return f"seconds a step: {total / len(history):.2f} = {' + '.join(words)}"


def seconds_ahead(seconds: Mapping[str, float], answers: int, config: OPCDConfig) -> float:
    """Of a whole run, about, by its first evaluation: `seconds` of drawing so many `answers` and of scoring them once.

    Half of the time of drawing grows with the answers, the other half reads weights; gradients take as long as the
    student's forward for an adapter, twice as long for all weights.
    """
    rollout, teacher, student, loss = (seconds.get(part, 0.0) for part in ("rollout", "teacher", "student", "loss"))
    more = config.batch_size * config.rollouts_per_prompt / answers
    passes = 2 + (not config.makes_adapter) + config.gradient_checkpointing
    step = more * (passes * student + 2 * loss + (teacher if config.objective == "divergence" else 0.0))
    step += 0.0 if config.rollout == "replay" else rollout * (1 + more) / 2
    evaluation = rollout + 2 * (teacher + student + loss)
    return config.steps * step + config.steps // config.eval_every * evaluation


def clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

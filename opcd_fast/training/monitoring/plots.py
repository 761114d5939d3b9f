"""Pictures of a run."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opcd_fast.runtime import write_file

Records = Sequence[dict[str, Any]]


def plot_run(folder: Path, history: Records, evaluations: Records) -> None:
    """kl.png, seconds.png and answers.png in `folder`; nothing for a run without steps. Raises OSError."""
    if history:
        if evaluations or _is_distance(history):
            plot_kl(folder / "kl.png", history, evaluations)
        plot_seconds(folder / "seconds.png", history)
        plot_answers(folder / "answers.png", history)


def plot_kl(path: Path, history: Records, evaluations: Records) -> None:
    """PNG: KL of each training step, and the held-out KL (own and fixed sequences) where it was measured."""

    def draw(axes: Any) -> None:
        if _is_distance(history):
            axes.plot([r["step"] for r in history], [r["loss"] for r in history], lw=1.5, label="training answers")
        for key, label in (("own_kl", "held-out, student's answers"), ("fixed_kl", "held-out, teacher's answers")):
            points = [(r["step"], r[key]) for r in evaluations if key in r]
            if points:
                axes.plot(*zip(*points), marker="o", ls="--", lw=1, label=label)
        axes.set(xlabel="step", ylabel="KL to the teacher, nats per token", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)

    _picture(path, draw)


def _is_distance(history: Records) -> bool:
    """Whether the loss is one to the teacher."""
    return history[-1].get("objective") != "nll"


def plot_seconds(path: Path, history: Records) -> None:
    """PNG: seconds of each step, stacked by part."""

    def draw(axes: Any) -> None:
        parts = list(history[-1]["seconds"])
        heights = [[r["seconds"].get(part, 0.0) for r in history] for part in parts]
        axes.stackplot([r["step"] for r in history], heights, labels=parts, step="mid")
        axes.set(xlabel="step", ylabel="seconds", ylim=(0, None))
        axes.legend(frameon=False, ncols=3, loc="upper right")

    _picture(path, draw)


def plot_answers(path: Path, history: Records) -> None:
    """PNG: length of the answers, and the student's entropy on them where it was measured."""

    def draw(axes: Any) -> None:
        steps = [r["step"] for r in history]
        lines = axes.plot(steps, [r["response_length"] for r in history], color="C0", label="length")
        axes.set(xlabel="step", ylabel="tokens per answer", ylim=(0, None))
        if "student_entropy" in history[-1]:
            other = axes.twinx()
            lines += other.plot(steps, [r["student_entropy"] for r in history], color="C1", label="entropy")
            other.set(ylabel="entropy, nats per token", ylim=(0, None))
        axes.legend(handles=lines, frameon=False)

    _picture(path, draw)


def plot_compression(path: Path, ranked: Records) -> None:
    """PNG: tokens of every candidate context against the KL it loses, with the front that no candidate beats."""

    def draw(axes: Any) -> None:
        kl = [row["kl"] for row in ranked]
        errors = [[row["kl"] - row["low"] for row in ranked], [row["high"] - row["kl"] for row in ranked]]
        tokens = [row["tokens"] for row in ranked]
        axes.errorbar(tokens, kl, yerr=errors, fmt="o", ms=3, lw=0.8, alpha=0.5, color="grey")
        front = [row for row in ranked if row["front"]]
        axes.plot([r["tokens"] for r in front], [r["kl"] for r in front], marker="o", lw=1.5, label="best so far")
        axes.set(
            xlabel="tokens of the context", ylabel="KL(full context || candidate), nats per token", ylim=(0, None)
        )
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    _picture(path, draw)


def _picture(path: Path, draw: Callable[[Any], None]) -> None:
    """Whole or not at all: a run may be killed while it draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_file(path, drawn.getvalue())

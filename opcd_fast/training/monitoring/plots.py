"""Pictures of a run."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
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

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        if _is_distance(history):
            axes.plot([r["step"] for r in history], [r["loss"] for r in history], lw=1.5, label="training answers")
        for key, label in (("own_kl", "held-out, student's answers"), ("fixed_kl", "held-out, teacher's answers")):
            points = [(r["step"], r[key]) for r in evaluations if key in r]
            if points:
                axes.plot(*zip(*points), marker="o", ls="--", lw=1, label=label)
        axes.set(xlabel="step", ylabel="KL to the teacher, nats per token", yscale="log")
        axes.grid(alpha=0.3, which="both")
        lines, labels = axes.get_legend_handles_labels()
        if "gate" in history[-1]:
            other = axes.twinx()
            lines += other.plot([r["step"] for r in history], [r["gate"] for r in history], color="C7", lw=1)
            labels.append("gate")
            other.set(ylabel="gate: share of the forward KL", ylim=(0, 1))
        axes.legend(lines, labels, frameon=False)

    save_plot(path, draw)


def _is_distance(history: Records) -> bool:
    """Whether the loss is one to the teacher."""
    return history[-1].get("objective") != "nll"


def plot_seconds(path: Path, history: Records) -> None:
    """PNG: seconds of each step, stacked by part."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        parts = list(history[-1]["seconds"])
        heights = [[r["seconds"].get(part, 0.0) for r in history] for part in parts]
        axes.stackplot([r["step"] for r in history], heights, labels=parts, step="mid")
        axes.set(xlabel="step", ylabel="seconds", ylim=(0, None))
        axes.legend(frameon=False, ncols=3, loc="upper right")

    save_plot(path, draw)


def plot_answers(path: Path, history: Records) -> None:
    """PNG: length of the answers, and the student's entropy on them where it was measured."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        steps = [r["step"] for r in history]
        lines = axes.plot(steps, [r["response_length"] for r in history], color="C0", label="length")
        axes.set(xlabel="step", ylabel="tokens per answer", ylim=(0, None))
        if "student_entropy" in history[-1]:
            other = axes.twinx()
            lines += other.plot(steps, [r["student_entropy"] for r in history], color="C1", label="entropy")
            other.set(ylabel="entropy, nats per token", ylim=(0, None))
        axes.legend(handles=lines, frameon=False)

    save_plot(path, draw)


def save_plot(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (7, 4)) -> None:
    """PNG, whole or not at all: a run may be killed while it draws. draw: is given the figure; size: in inches."""
    write_file(path, drawn(draw, "png", size, dpi=120))


def drawn(
    draw: Callable[[Any], None],
    kind: str,
    size: tuple[float, float],
    settings: Mapping[str, Any] | None = None,
    **saving: Any,
) -> bytes:
    """A figure as a file of `kind`, without a window.

    settings: rcParams on top of matplotlib's own defaults, in place of what this machine has.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with nullcontext() if settings is None else style.context(["default", dict(settings)]):
        figure, file = Figure(figsize=size, layout="constrained"), io.BytesIO()
        draw(figure)
        figure.savefig(file, format=kind, **saving)
    return file.getvalue()

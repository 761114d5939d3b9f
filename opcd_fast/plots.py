"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_kl(path: Path, history: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> None:
    """PNG: KL of each training step, and the held-out KL (own and fixed sequences) where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot([r["step"] for r in history], [r["loss"] for r in history], lw=1.5, label="training answers")
    for key, label in (("own_kl", "held-out, student's answers"), ("fixed_kl", "held-out, teacher's answers")):
        points = [(r["step"], r[key]) for r in evaluations if key in r]
        if points:
            axes.plot(*zip(*points), marker="o", ls="--", lw=1, label=label)
    axes.set(xlabel="step", ylabel="KL to the teacher, nats per token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)

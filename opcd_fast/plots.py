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


def plot_compression(path: Path, ranked: Sequence[dict[str, Any]]) -> None:
    """PNG: tokens of every candidate context against the KL it loses, with the front that no candidate beats."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    kl = [row["kl"] for row in ranked]
    errors = [[row["kl"] - row["low"] for row in ranked], [row["high"] - row["kl"] for row in ranked]]
    axes.errorbar([row["tokens"] for row in ranked], kl, yerr=errors, fmt="o", ms=3, lw=0.8, alpha=0.5, color="grey")
    front = [row for row in ranked if row["front"]]
    axes.plot([row["tokens"] for row in front], [row["kl"] for row in front], marker="o", lw=1.5, label="best so far")
    axes.set(xlabel="tokens of the context", ylabel="KL(full context || candidate), nats per token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)

"""Charts of a report as SVG inside its page: text stays text, colours are the page's, same data give same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opcd_fast.evaluation.report.models import STUDENT
from opcd_fast.evaluation.report.words import percent
from opcd_fast.training.monitoring import drawn

# Stand-ins in the drawing, each replaced by the variable of the page's style, which knows a light and a dark theme.
NAMES = ("text", "soft", "rule", "muted", "accent", "second")
COLOURS = {name: f"#0000{number:02x}" for number, name in enumerate(NAMES, 1)}
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "opcd", "font.family": "DejaVu Sans", "font.size": 10,
    "axes.edgecolor": COLOURS["rule"], "axes.labelcolor": COLOURS["soft"], "grid.color": COLOURS["rule"],
    "xtick.color": COLOURS["soft"], "ytick.color": COLOURS["soft"], "text.color": COLOURS["text"],
    "xtick.labelcolor": COLOURS["soft"], "ytick.labelcolor": COLOURS["text"],
    "legend.labelcolor": COLOURS["text"], "legend.frameon": False, "legend.handletextpad": 0.4,
    "figure.facecolor": "none", "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
FLOOR = 1e-4  # nats; less is drawn there


def training(curve: Mapping[str, Any]) -> str:
    """KL of each training step, and the held-out KLs, over steps; "" for a run that kept none."""
    series = {
        "training answers": ("muted", [tuple(point) for point in curve["steps"]]),
        "held-out, student's answers": ("accent", [(step, own) for step, own, _ in curve["evaluations"]]),
        "held-out, answers of base + context": ("second", [(step, kl) for step, _, kl in curve["evaluations"]]),
    }
    shown = {name: (colour, [p for p in points if p[1] is not None and p[1] > 0])
             for name, (colour, points) in series.items()}  # fmt: skip
    shown = {name: found for name, found in shown.items() if found[1]}
    if not shown:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, (colour, points) in shown.items():
            marker = "" if colour == "muted" and len(points) > 1 else "o"
            axes.plot(*zip(*points), color=COLOURS[colour], lw=2, marker=marker, label=name, gid=f"line-{colour}")
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _logarithmic(axes.yaxis, [kl for _, points in shown.values() for _, kl in points])
        figure.legend(loc="outside upper left", ncols=len(shown), columnspacing=1)

    return _svg(draw, "KL to the teacher over training steps, nats per token, logarithmic", height=3)


def before_after(kl: Mapping[str, Any]) -> str:
    """Median, mean, p90 and p99 of the token KL before and after, for both kinds of answers."""
    rows = []
    for key, kind in (("own", "student's answers"), ("fixed", "answers of base + context")):
        for field, name in (("p50", "median"), ("value", "mean"), ("p90", "p90"), ("p99", "p99")):
            label = f"{kind}: {name}" if field == "p50" else name
            rows.append((label, *(max(FLOOR, kl[key][when][field]) for when in ("before", "after"))))
    heights = [-index - (index > 3) for index in range(len(rows))]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        labels, before, after = zip(*rows)
        axes.hlines(heights, before, after, color=COLOURS["muted"], lw=2, zorder=1)
        axes.plot(before, heights, "o", color=COLOURS["muted"], label="before", gid="dots-before")
        axes.plot(after, heights, "o", color=COLOURS["accent"], label="after", gid="dots-after")
        axes.set_yticks(heights, labels)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("nats per token")
        _logarithmic(axes.xaxis, [*before, *after])
        figure.legend(loc="outside upper left", ncols=2)

    return _svg(draw, "token KL before and after, nats, logarithmic", height=3.4)


def score(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """A score of each arm with its 95 % interval."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for height, (arm, found) in enumerate(arms.items()):
            colour = COLOURS["accent" if arm.startswith(STUDENT) else "muted"]
            axes.barh(height, found["value"], color=colour, height=0.55, gid=f"bar-{height}")
            if found["low"] < found["high"]:
                axes.plot([found["low"], found["high"]], [height] * 2, color=COLOURS["text"], lw=1.5)
            axes.text(1.02, height, percent(found["value"]), va="center")
        axes.set_yticks(range(len(arms)), list(arms))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)

    return _svg(draw, "score of each arm with its 95% interval", height=0.5 + 0.33 * len(arms))


def _logarithmic(axis: Any, values: Sequence[float]) -> None:
    """At least a decade, a little more than the values."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(values) / 1.3, max(values) * 1.3
    high = max(high, low * 10)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # 0.1, not 10^-1
    axis.set_minor_formatter(NullFormatter())
    axis.grid(True)


def _svg(draw: Callable[[Any], None], title: str, height: float) -> str:
    """One element, 576 points wide."""
    text = drawn(draw, "svg", (8, height), settings=SETTINGS, metadata={"Date": None}).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    text = f'<svg {view[0] if view else ""} role="img" aria-label="{title}"' + text[text.index(">") :]
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text

"""Plots of a report as inline SVG: no script, no picture files, colours of the page's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from opcd_fast.evaluation.report.words import nats, percent

WIDTH = 720
Point = tuple[float, float]


def training(curve: Mapping[str, Any]) -> str:
    """KL of each training step, and the held-out KLs, over steps; a logarithmic scale."""
    series: list[tuple[str, str, list[Point]]] = [
        ("s1", "training answers", [(s, v) for s, v in curve["steps"]]),
        ("s2", "held-out, student's answers", [(s, own) for s, own, _ in curve["evaluations"] if own is not None]),
        ("s3", "held-out, answers of base + context", [(s, f) for s, _, f in curve["evaluations"] if f is not None]),
    ]
    series = [(css, label, [p for p in points if p[1] > 0]) for css, label, points in series]
    every = [point for _, _, points in series for point in points]
    if not every:
        return ""
    left, right, top, bottom, height = 58, 14, 34, 44, 330
    last = max(max(x for x, _ in every), 1)
    low, high = _decades([y for _, y in every])

    def x_of(x: float) -> float:
        return left + (WIDTH - left - right) * x / last

    def y_of(y: float) -> float:
        return top + (height - top - bottom) * (math.log10(high) - math.log10(y)) / math.log10(high / low)

    body = []
    for tick in _log_ticks(low, high):
        y = y_of(tick)
        body.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(last):
        body.append(
            f'<text class="tick" x="{x_of(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick}</text>'
        )
    body.append(f'<text class="tick" x="{(left + WIDTH) / 2:.0f}" y="{height - 8}" text-anchor="middle">step</text>')
    place = left
    for css, label, points in series:
        if not points:
            continue
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        body.append(f'<polyline class="line {css}" points="{path}"/>')
        if css != "s1" or len(points) == 1:
            body += [f'<circle class="dot {css}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="4"/>' for x, y in points]
        body.append(f'<circle class="dot {css}" cx="{place + 5}" cy="14" r="5"/>')
        body.append(f'<text class="label" x="{place + 15}" y="18">{escape(label)}</text>')
        place += 30 + round(6.8 * len(label))
    return _svg(body, height, "KL to the teacher over training steps, nats per token, logarithmic")


def before_after(kl: Mapping[str, Any]) -> str:
    """Median, mean, p90 and p99 of the token KL before and after, for both kinds of answers; a logarithmic scale."""
    rows = []
    for key, name in (("own", "student's answers"), ("fixed", "answers of base + context")):
        for field, label in (("p50", "median"), ("value", "mean"), ("p90", "p90"), ("p99", "p99")):
            rows.append((name if field == "p50" else "", label, kl[key]["before"][field], kl[key]["after"][field]))
    floor = 1e-4
    values = [max(floor, v) for *_, a, b in rows for v in (a, b)]
    low, high = _decades(values)
    left, right, top, step = 260, 70, 34, 26
    height = top + step * len(rows) + 16 + 34

    def x_of(value: float) -> float:
        place = (math.log10(max(value, floor, low)) - math.log10(low)) / math.log10(high / low)
        return left + (WIDTH - left - right) * place

    body = [
        '<circle class="dot muted" cx="265" cy="14" r="5"/><text class="label" x="275" y="18">before</text>',
        '<circle class="dot s2" cx="345" cy="14" r="5"/><text class="label" x="355" y="18">after</text>',
    ]
    bottom = top + step * len(rows) + 16
    for tick in _log_ticks(low, high):
        x = x_of(tick)
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for index, (name, label, first, second) in enumerate(rows):
        y = top + 18 + step * index + (12 if index >= 4 else 0)
        if name:
            body.append(f'<text class="label strong" x="0" y="{y + 4}">{escape(name)}</text>')
        body.append(f'<text class="label" x="{left - 14}" y="{y + 4}" text-anchor="end">{label}</text>')
        body.append(f'<line class="link" x1="{x_of(first):.1f}" x2="{x_of(second):.1f}" y1="{y}" y2="{y}"/>')
        body.append(f'<circle class="dot muted" cx="{x_of(first):.1f}" cy="{y}" r="5"/>')
        body.append(
            f'<circle class="dot s2" cx="{x_of(second):.1f}" cy="{y}" r="5"><title>{nats(second)}</title></circle>'
        )
    return _svg(body, height, "token KL before and after, nats, logarithmic")


def scores(scores_: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    """Each score of each arm with its 95% interval."""
    if not scores_:
        return ""
    left, right, step = 190, 80, 26
    body: list[str] = []
    y = 8

    def x_of(value: float) -> float:
        return left + (WIDTH - left - right) * value

    for score in scores_:
        name = score["name"] if len(score["name"]) <= 80 else score["name"][:79] + "…"
        body.append(f'<text class="label strong" x="0" y="{y + 12}">{escape(name)}</text>')
        y += 24
        for arm in arms:
            found = score["arms"][arm]
            middle = y + step / 2
            css = "s2" if arm.startswith("student") else "muted"
            body.append(f'<text class="label" x="{left - 14}" y="{middle + 4}" text-anchor="end">{escape(arm)}</text>')
            body.append(
                f'<rect class="track" x="{left}" y="{middle - 7}" width="{WIDTH - left - right}" height="14" rx="3"/>'
            )
            width = max(0.0, x_of(found["value"]) - left)
            body.append(f'<rect class="bar {css}" x="{left}" y="{middle - 7}" width="{width:.1f}" height="14" rx="3"/>')
            low, high = x_of(found["low"]), x_of(found["high"])
            body.append(f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>')
            body.append(
                f'<text class="label" x="{WIDTH - right + 10}" y="{middle + 4}">{percent(found["value"])}</text>'
            )
            y += step
        y += 12
    return _svg(body, y, "scores of the four arms with 95% intervals")


def _svg(body: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Bounds for a logarithmic axis, a little outside of the values and never equal."""
    low, high = min(values) / 1.3, max(values) * 1.3
    return low, max(high, low * 10)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 10, 100 ...; and 2 and 5 between where there is room."""
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    found = []
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        found += [factor * 10.0**exponent for factor in factors if low <= factor * 10.0**exponent <= high]
    return found


def _ticks(last: float) -> list[int]:
    """About six whole numbers from 0 to `last`."""
    raw = max(1.0, last / 6)
    scale = 10 ** math.floor(math.log10(raw))
    step = max(1, round(next(s for s in (1, 2, 5, 10) if s * scale >= raw) * scale))
    return list(range(0, int(last) + 1, step))

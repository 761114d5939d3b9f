"""Runs to one table, and a picture of it: means over seeds with intervals, and differences between systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_fast.evaluation.compare.seeds import over_seeds
from opcd_fast.evaluation.report import rounding
from opcd_fast.runtime import wilson
from opcd_fast.training.monitoring import save_plot


@dataclass(frozen=True)
class Measure:
    """A column. `share`: shown in per cent. `cost`: in the second table, beside the base and base + context."""

    name: str
    title: str
    share: bool = False
    cost: bool = False


MEASURES = (
    Measure("own_gap_closed", "KL gap closed, own answers", share=True),
    Measure("fixed_gap_closed", "KL gap closed, fixed answers", share=True),
    Measure("score", "behaviour", share=True),
    Measure("task_score", "task score", share=True),
    Measure("general_context_kl", "KL to base + context, unrelated prompts", cost=True),
    Measure("general_kl", "KL to the base, unrelated prompts", cost=True),
    Measure("other_context", "obeys another context", share=True, cost=True),
    Measure("second_turn", "behaviour, second turn", share=True, cost=True),
)
ABILITY = "ability "  # before the name of each, in a summary
LOWEST = -0.3  # where a plot's axis of shares ends
COUNTS = ("drawn_answers", "drawn_tokens", "trained_tokens", "seconds")


def measures_of(runs: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """Those of every comparison, and the abilities of this one."""
    names = dict.fromkeys(name for run in runs for name in run.get("abilities", {}))
    return [*MEASURES, *(Measure(ABILITY + name, f"ability: {name}", share=True, cost=True) for name in names)]


def _found(run: Mapping[str, Any], name: str) -> Any:
    """A measure of a run: a number, or {"score": their mean, "scores": of each answer}; None where it was not taken."""
    if name.startswith(ABILITY):
        return run.get("abilities", {}).get(name.removeprefix(ABILITY))
    return run.get(name)


def value(run: Mapping[str, Any], name: str) -> float | None:
    found = _found(run, name)
    return found["score"] if isinstance(found, Mapping) else found


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """What `run_all` gives, with per-seed shares of the gap closed, intervals and differences from the first system."""
    runs = {
        label: [_with_shares(run, results["baselines"][run["context"]]["base"]) for run in found]
        for label, found in results["runs"].items()
    }
    systems = {label: {"runs": found, "summary": _summary(found)} for label, found in runs.items()}
    first = next(iter(runs))
    return {
        "baselines": results["baselines"],
        "systems": systems,
        "differences": {label: _differences(found, runs[first]) for label, found in runs.items() if label != first},
        "compared_with": first,
    }


def _with_shares(run: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    shares = {
        f"{name}_gap_closed": 1 - run[f"{name}_kl"] / base[f"{name}_kl"] if base[f"{name}_kl"] > 0 else None
        for name in ("own", "fixed")
    }
    return {**run, **shares}


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    measures = measures_of(runs)
    for name in (*(measure.name for measure in measures), *COUNTS, "own_kl", "fixed_kl", "own_top1", "length"):
        values = [value(run, name) for run in runs]
        if all(one is not None for one in values):
            found[name] = over_seeds([float(one) for one in values])  # type: ignore[arg-type]
    for name in (one.name for one in measures if one.share and not one.name.endswith("gap_closed")):
        if name in found and found[name]["low"] is not None:  # from 0 to 1, which Student's t does not know
            found[name] |= {"low": max(found[name]["low"], 0.0), "high": min(found[name]["high"], 1.0)}
        taken = [run if name == "score" else _found(run, name) for run in runs]
        if name in found and all(isinstance(one, Mapping) for one in taken):
            found[name] |= _over_answers([score for one in taken for score in one["scores"]])
    return found


def _over_answers(scores: Sequence[float]) -> dict[str, Any]:
    """The interval that answers as such give, where a score is right or wrong: Wilson's, over all seeds together."""
    if not set(scores) <= {0.0, 1.0}:
        return {"answers": len(scores)}
    low, high = wilson(round(sum(scores)), len(scores))
    return {"answers": len(scores), "answers_low": low, "answers_high": high}


def _differences(runs: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per seed: this system minus the first one. Runs of one seed have the same prompts in the same order."""
    found = {}
    for name in (measure.name for measure in measures_of(runs)):
        pairs = [(value(run, name), value(other, name)) for run, other in zip(runs, first, strict=True)]
        if all(a is not None and b is not None for a, b in pairs):
            found[name] = over_seeds([a - b for a, b in pairs])  # type: ignore[operator]
    return found


def interval(found: Mapping[str, Any]) -> tuple[float, float] | None:
    """The wider of the intervals over seeds and over answers, end by end; None for one seed without the latter."""
    ends = [(found["low"], found["high"]), (found.get("answers_low"), found.get("answers_high"))]
    known = [(low, high) for low, high in ends if low is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def as_markdown(summary: Mapping[str, Any], title: str) -> str:
    """The page compare.md."""
    every = measures_of([run for found in summary["systems"].values() for run in found["runs"]])
    every = [m for m in every if any(m.name in s["summary"] for s in summary["systems"].values())]
    shown = [m for m in every if not m.cost]
    head = ["system", "seeds", *(m.title for m in shown), "answers drawn", "tokens drawn", "seconds"]
    lines = [f"# {title}", "", _row(head), _row(["---"] * len(head))]
    for label, found in summary["systems"].items():
        numbers, seeds = found["summary"], len(found["runs"])
        cells = [_cell(numbers.get(m.name), m.share) for m in shown]
        counts = [f"{numbers[name]['mean']:.0f}" for name in ("drawn_answers", "drawn_tokens", "seconds")]
        lines.append(_row([label, str(seeds), *cells, *counts]))
    lines += ["", "Mean over seeds [95 % interval]: Student's t over seeds; for the behaviour the wider of that and "
              "Wilson's over answers. The gap is the KL of the base model without the context to the teacher with it.",
              "", *_baseline_lines(summary["baselines"]), *_costs(summary, [m for m in every if m.cost])]  # fmt: skip
    rounded = rounding(summary.get("ran", {}))
    lines += ["", rounded] if rounded else []
    if summary["differences"]:
        lines += ["", f"Differences from {summary['compared_with']}, seed by seed:", "",
                  _row(["system", *(m.title for m in every)]), _row(["---"] * (len(every) + 1))]  # fmt: skip
        for label, found in summary["differences"].items():
            lines.append(_row([label, *(_cell(found.get(m.name), m.share, sign=True) for m in every)]))
    return "\n".join(lines) + "\n"


def _costs(summary: Mapping[str, Any], shown: Sequence[Measure]) -> list[str]:
    """The second table: what it cost, and whether it lasts; the base and base + context on top, to read it by."""
    if not shown:
        return []
    lines = ["", "Beyond the held-out prompts, each on the model's own answers:", "",
             _row(["", *(m.title for m in shown)]), _row(["---"] * (len(shown) + 1))]  # fmt: skip
    for key, found in summary["baselines"].items():
        which = "" if len(summary["baselines"]) == 1 else f" ({key})"
        for arm, numbers in found.items():
            if arm == "base + context" and numbers.get("general_kl") is not None:
                numbers = {**numbers, "general_context_kl": 0.0}  # from itself
            cells = [_cell(_summary([numbers]).get(m.name), m.share) for m in shown]
            lines.append(_row([arm + which, *cells]))
    for label, system in summary["systems"].items():
        lines.append(_row([label, *(_cell(system["summary"].get(m.name), m.share) for m in shown)]))
    return lines


def _baseline_lines(baselines: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, found in baselines.items():
        base, shown = found["base"], found["base + context"]
        which = "" if len(baselines) == 1 else f" (context {key})"
        text = f"Before training{which}: KL {base['own_kl']:.4f} (own answers), {base['fixed_kl']:.4f} (fixed answers)"
        for name in ("score", "task_score"):
            if base.get(name) is not None:
                text += f"; {name.replace('_', ' ')} {base[name]:.1%} without the context, {shown[name]:.1%} with it"
        lines.append(text + ".")
    return lines


def _cell(found: Mapping[str, Any] | None, share: bool, sign: bool = False) -> str:
    if found is None:
        return "not measured"
    plus = "+" if sign else ""
    form = f"{{:{plus}.1%}}" if share else f"{{:{plus}.4f}}"
    ends = interval(found)
    mean = form.format(found["mean"])
    return mean if ends is None else f"{mean} [{form.format(ends[0])}, {form.format(ends[1])}]"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plot_comparison(path: Path, summary: Mapping[str, Any]) -> None:
    """PNG: a panel for each measure taken of all, a mark for the mean, a bar for the interval, a dot for each seed.

    A share's axis ends at `LOWEST`; a mean below it is an arrow at that end with its number.
    """
    from matplotlib.ticker import PercentFormatter

    systems = summary["systems"]
    drawn = [m for m in MEASURES if not (m.cost and m.share)]
    shown = [m for m in drawn if all(m.name in s["summary"] for s in systems.values())]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for panel, measure in zip(panels, shown):
            for height, found in enumerate(systems.values()):
                numbers = found["summary"][measure.name]
                ends, mean = interval(numbers), numbers["mean"]
                if ends is not None and ends[0] < ends[1]:
                    panel.plot(ends, [height, height], color="grey", lw=2)
                panel.plot([run[measure.name] for run in found["runs"]], [height] * len(found["runs"]), "k.", ms=4)
                if measure.share and mean < LOWEST:
                    panel.plot([LOWEST], [height], "<", ms=7, color="tab:blue", clip_on=False)
                    panel.text(LOWEST + 0.05, height, f"{mean:.0%}", va="center", fontsize=8,
                               bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
                else:
                    panel.plot([mean], [height], "D", ms=6, color="tab:blue")
            panel.set_title(measure.title, fontsize=9)
            panel.set_yticks(range(len(systems)), list(systems))
            panel.grid(alpha=0.3)
            if measure.share:
                panel.xaxis.set_major_formatter(PercentFormatter(1.0))
                low, high = panel.get_xlim()
                panel.set_xlim(max(low, LOWEST), min(high, 1.1))
        panels[0].invert_yaxis()

    save_plot(path, draw, (3.2 * len(shown), 0.9 + 0.4 * len(systems)))

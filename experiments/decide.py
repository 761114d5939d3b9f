"""Which divergence is the default: the rule registered in README.md, applied to the files of results.

`python -m experiments.decide` prints the table, the winner or where each system fails, and what is still to be run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from experiments import record
from experiments.experiment import RESULTS, SCREENED
from opcd_fast.runtime import bootstrap

CONTEXTS = ("few_shot_form", "persona", "made_up_money", "answer_tag", "identity", "policy")
SCREENING = ("persona", "made_up_money", "identity")
BEFORE = "reverse"
FIRST = "gated"  # the best of the screening, one seed each (docs/experiments.md)
SEEDS = dict.fromkeys(CONTEXTS, 3) | {"policy": 1}  # of the second stage
# Reads of the logits in a step; answers begun by the teacher count as more.
COST = {"reverse": 2, "forward": 2, "gated": 2, "forward-then-reverse": 2, "todi": 2, "gated-tv": 3, "gated-begun": 4}
GAP, BEHAVIOUR, SHOWN = 0.90, 0.95, 0.80
MEASURES = {"own_kls": "gap, own answers", "fixed_kls": "gap, fixed answers", "scores": "behaviour"}
SUMMARY = {"own_kls": "own_gap_closed", "fixed_kls": "fixed_gap_closed", "scores": "score"}


@dataclass(frozen=True)
class Estimate:
    """A share and its 95 % interval: over prompts, or over seeds where a run has no value for each prompt."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" ({100 * self.low:.1f} to {100 * self.high:.1f})"
        return f"{100 * self.value:.1f} %{ends}"


@dataclass(frozen=True)
class Outcome:
    """A system on a context: its estimates, what they are short of, and how many seeds they are from."""

    measured: Mapping[str, Estimate]
    failures: Sequence[str]
    seeds: int


def outcomes(kept: Mapping[str, Any]) -> dict[str, Outcome]:
    """Of every system in a file of results."""
    (baseline,) = kept["baselines"].values()
    wanted = baseline["base + context"].get("score")
    summary = record.summary(kept, BEFORE)
    found = {}
    for label, system in kept["systems"].items():
        measured, failures = {}, []
        for name in MEASURES:
            estimate = _estimate(kept, summary, name, label)
            if estimate is None:
                continue
            measured[name] = estimate
            lead = _lead(kept, summary, name, label)
            if lead is not None and lead.high is not None and lead.high < 0:
                failures.append(f"{MEASURES[name]}: {lead} against {BEFORE}")
        if wanted is not None and wanted >= SHOWN:
            if measured["own_kls"].value < GAP:
                failures.append(f"closes {100 * measured['own_kls'].value:.1f} % of the gap")
            if measured["scores"].value < BEHAVIOUR * wanted:
                failures.append(f"behaviour {measured['scores'].value / wanted:.1%} of base + context's")
        found[label] = Outcome(measured, failures, len(system["runs"]))
    return found


def _estimate(kept: Mapping[str, Any], summary: Mapping[str, Any], name: str, label: str) -> Estimate | None:
    units = _units(kept, name, [label])
    if units is not None:
        return _bootstrapped(units, lambda drawn: _share(name, drawn, 0))
    return _over_seeds(summary["systems"][label]["summary"].get(SUMMARY[name]))


def _lead(kept: Mapping[str, Any], summary: Mapping[str, Any], name: str, label: str) -> Estimate | None:
    """How far it is ahead of the reverse KL; None where that was not measured."""
    if label == BEFORE or BEFORE not in kept["systems"]:
        return None
    units = _units(kept, name, [label, BEFORE])
    if units is not None:
        return _bootstrapped(units, lambda drawn: _share(name, drawn, 0) - _share(name, drawn, 1))
    return _over_seeds(summary["differences"].get(label, {}).get(SUMMARY[name]))


def _units(kept: Mapping[str, Any], name: str, labels: Sequence[str]) -> list[tuple[float, ...]] | None:
    """For every held-out prompt the mean of each system, all seeds and answers pooled, and the base's at the end.

    None where a run or the base has only its mean.
    """
    (baseline,) = kept["baselines"].values()
    rows = [[run.get(name) for run in kept["systems"][label]["runs"]] for label in labels] + [
        [baseline["base"].get(name)]
    ]
    if not all(values for row in rows for values in row):
        return None
    prompts = len(rows[-1][0]) // kept["settings"]["answers_per_prompt"]
    return [tuple(fmean(v for values in row for v in values[i::prompts]) for row in rows) for i in range(prompts)]


def _share(name: str, units: Sequence[tuple[float, ...]], which: int) -> float:
    mean = fmean(unit[which] for unit in units)
    return mean if name == "scores" else 1 - mean / fmean(unit[-1] for unit in units)


def _bootstrapped(units: Sequence[tuple[float, ...]], statistic: Any) -> Estimate:
    return Estimate(statistic(units), *bootstrap(units, statistic))


def _over_seeds(found: Mapping[str, Any] | None) -> Estimate | None:
    return None if found is None else Estimate(found["mean"], found["low"], found["high"])


def ranked(table: Mapping[str, Mapping[str, Outcome]], contexts: Sequence[str]) -> list[str]:
    """Candidates measured on all these contexts, the best first: most contexts passed, then the cheapest, then the
    largest mean gap closed on own answers."""
    whole = [label for label in COST if all(label in table.get(context, {}) for context in contexts)]

    def key(label: str) -> tuple[float, ...]:
        passed = sum(not table[context][label].failures for context in contexts)
        gap = fmean(table[context][label].measured["own_kls"].value for context in contexts)
        return -passed, COST[label], -gap

    return sorted(whole, key=key)


def missing(table: Mapping[str, Mapping[str, Outcome]]) -> list[str]:
    """Commands that make what the next stage needs."""

    def commands(seeds: Mapping[str, int], labels: Sequence[str]) -> list[str]:
        found = []
        for context, count in seeds.items():
            seen = table.get(context, {})
            short = [label for label in labels if label not in seen or seen[label].seeds < count]
            if short:
                found.append(f"python -m experiments.{context} --systems {','.join(short)} --seeds {count}")
        return found

    return commands(dict.fromkeys(SCREENING, 1), SCREENED) or commands(SEEDS, [FIRST, BEFORE])


def page(table: Mapping[str, Mapping[str, Outcome]]) -> str:
    lines = ["| context | system | seeds | " + " | ".join(MEASURES.values()) + " | fails |"]
    lines.append("|" + "---|" * (len(MEASURES) + 4))
    for context in CONTEXTS:
        for label in (label for label in SCREENED if label in table.get(context, {})):
            found = table[context][label]
            cells = [str(found.measured.get(name, "")) for name in MEASURES]
            lines.append(f"| {context} | {label} | {found.seeds} | {' | '.join(cells)} | {'; '.join(found.failures)} |")
    to_do, best = missing(table), ranked(table, CONTEXTS)
    lines.append("")
    if to_do:
        lines += ["Not decided yet. Still to be run:", "", *(f"    {command}" for command in to_do)]
    elif all(not table[context][best[0]].failures for context in CONTEXTS):
        lines.append(f"The winner is {best[0]}: it passes on every context.")
    else:
        failed = [f"{context} ({'; '.join(table[context][best[0]].failures)})" for context in CONTEXTS
                  if table[context][best[0]].failures]  # fmt: skip
        lines.append(f"None passes on every context. {best[0]} passes on most; it fails on {', '.join(failed)}.")
    return "\n".join(lines)


def read_table() -> dict[str, dict[str, Outcome]]:
    kept = {context: record.read(RESULTS / f"{context}.json") for context in CONTEXTS}
    return {context: outcomes(found) for context, found in kept.items() if found}


if __name__ == "__main__":
    print(page(read_table()))

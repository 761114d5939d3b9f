"""Files of results that add up: a run is kept with where it was made, and joins runs with the same settings only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opcd_fast.commands.compare import CompareCommand
from opcd_fast.errors import InputError
from opcd_fast.evaluation.compare import as_markdown, plot_comparison, summarize
from opcd_fast.runtime import write_text
from opcd_fast.training.settings import OPCDConfig, settings_with

APART = 0.1
"""How far the base model may measure from the file's own measurement, as a share: sampled answers differ between kinds
of device, and so do means over a hundred of them."""
FREE = {"output_dir", "seed"}  # by name: they are set for each run


def settings_of(command: CompareCommand, files: Mapping[str, Path]) -> dict[str, Any]:
    """What must be the same for runs to stand in one file. Of files their contents count, not only the names."""
    names = {field.name for field in dataclasses.fields(OPCDConfig)} - FREE
    for belongs in ("system", "machine", "place", "comparison"):
        names -= {*settings_with(belongs=belongs)}
    # How a run is computed may differ between machines; how long it is and in which numbers may not.
    names -= {*settings_with(belongs="resume")} - {"steps", "dtype"}
    chosen = {
        name: getattr(command, name)
        for name in ("model", "context", "prompts", "eval_prompts", "general", "regex", "answers_per_prompt")
    }
    contents = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in files.items()}
    run = {name: getattr(command.run, name) for name in sorted(names) if hasattr(command.run, name)}
    return json.loads(json.dumps({**chosen, "contents": contents, "run": run}))


def check(kept: Mapping[str, Any], settings: Mapping[str, Any], label: str, system: str, file: Path) -> None:
    """Raises InputError where a new run would differ in more than its system and seed from those in the file."""
    if not kept:
        return
    before, now = _flat(kept["settings"]), _flat(settings)
    for name in before.keys() | now.keys():
        # A setting that came later had its default before.
        default = getattr(OPCDConfig(), name.removeprefix("run."), None) if name.startswith("run.") else None
        default = list(default) if isinstance(default, tuple) else default
        if before.get(name, default) != now.get(name, default):
            _refuse(file, name, before.get(name, default), now.get(name, default))
    there = kept["systems"].get(label)
    if there is not None and there["system"] != system:
        _refuse(file, f"system {label}", there["system"], system)


def _refuse(file: Path, name: str, before: Any, now: Any) -> None:
    raise InputError(
        f"{file}: its runs have {name} = {before!r:.80}, this one {now!r:.80}; they are not mixed. Use the same, or "
        "move the file away and make all runs anew"
    )


def _flat(settings: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{head}{name}.") if isinstance(value, Mapping) else {f"{head}{name}": value}
    return found


def has(kept: Mapping[str, Any], label: str, seed: int) -> bool:
    return any(run["seed"] == seed for run in kept.get("systems", {}).get(label, {"runs": []})["runs"])


def merge(
    kept: Mapping[str, Any],
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    label: str,
    system: str,
    made: Mapping[str, str],
) -> dict[str, Any]:
    """The results with the runs of one system that `opcd compare` gives; a run of the same seed is replaced.

    Raises InputError where the base model measured differently on that machine: something else than the run differs.
    """
    kept = {"settings": settings, "baselines": {}, "systems": {}, **kept}
    baselines = dict(kept["baselines"])
    for key, measured in found["baselines"].items():
        before = baselines.get(key)
        if before is not None:
            _check_baseline(before["base"], measured["base"])
        if before is None or measured["base"].keys() - before["base"].keys():  # more is measured by now
            baselines[key] = {**measured, "made": dict(made)}
    new = [{**run, "made": dict(made)} for run in found["systems"][label]["runs"]]
    seeds = {run["seed"] for run in new}
    old = kept["systems"].get(label, {"runs": []})["runs"]
    runs = sorted([*(run for run in old if run["seed"] not in seeds), *new], key=lambda run: run["seed"])
    return {**kept, "baselines": baselines, "systems": {**kept["systems"], label: {"system": system, "runs": runs}}}


def _check_baseline(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in ("own_kl", "fixed_kl"):
        if abs(now[name] - before[name]) > APART * before[name]:
            raise InputError(
                f"the base model's {name} is {now[name]:.4f} here and {before[name]:.4f} in the results, more than "
                f"{APART:.0%} apart: the runs do not belong together. Look for what differs (versions, device)"
            )


def summary(kept: Mapping[str, Any], first: str = "reverse") -> dict[str, Any]:
    """As `opcd compare` has it, for systems that may have different seeds; differences over those in common."""
    runs = {label: found["runs"] for label, found in kept["systems"].items()}
    runs = {label: runs[label] for label in sorted(runs, key=lambda label: label != first)}

    def of(part: Mapping[str, Any]) -> dict[str, Any]:
        return summarize({"baselines": kept["baselines"], "runs": part})

    first = next(iter(runs))
    systems = {label: of({label: found})["systems"][label] for label, found in runs.items()}
    differences = {}
    for label, found in runs.items():
        seeds = {run["seed"] for run in found} & {run["seed"] for run in runs[first]}
        if label != first and seeds:
            part = {one: [run for run in runs[one] if run["seed"] in seeds] for one in (first, label)}
            differences[label] = of(part)["differences"][label]
    arms = {key: {arm: found[arm] for arm in found if arm != "made"} for key, found in kept["baselines"].items()}
    return {
        "baselines": arms, "systems": systems, "differences": differences, "compared_with": first,
    }  # fmt: skip


def page(kept: Mapping[str, Any], name: str) -> str:
    lines = [as_markdown(summary(kept), f"{name}: {kept['settings']['model']}"), "Where the runs were made:", ""]
    places: dict[str, list[str]] = {}
    for label, system in kept["systems"].items():
        for run in system["runs"]:
            made = run["made"]
            where = f"commit {made['commit'][:7]}, {made['date'][:10]}, {made['device']}, torch {made['torch']}"
            places.setdefault(where, []).append(f"{label} {run['seed']}")
    return "\n".join([*lines, *(f"- {where}: {', '.join(runs)}" for where, runs in places.items())]) + "\n"


def read(path: Path) -> dict[str, Any]:
    """{} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, kept: Mapping[str, Any]) -> None:
    """The results, and the table and the plot made from them."""
    write_text(path, as_json(kept))
    write_text(path.with_suffix(".md"), page(kept, path.stem))
    plot_comparison(path.with_suffix(".png"), summary(kept))


def as_json(value: Mapping[str, Any]) -> str:
    """A list of numbers in one line."""
    numbers = r"\[\n\s+([-\d][^\[\]{}\"]*?)\n\s+\]"
    return re.sub(numbers, lambda found: f"[{' '.join(found[1].split())}]", json.dumps(value, indent=1)) + "\n"

"""What a run's folder says about its training. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.runtime import read_object
from opcd_fast.training.settings import AUTO, OPCDConfig, check_values, known_settings, settings_with


def run_settings(run: Path) -> dict[str, Any]:
    """config.json of a run. Raises InputError where there is none, or a setting that was used and is gone."""
    path = run / "config.json"
    settings = read_object(path, f"; {str(run)!r} is not a run")
    if "output_dir" not in settings:
        raise InputError(f"{str(run)!r} is not a run of `opcd train`: its config.json holds other things")
    settings = known_settings(settings, repr(str(path)), "take it out of that file to go on with what runs do now")
    try:
        check_values(settings)
    except InputError as error:
        raise InputError(f"{str(path)!r} is damaged: {error}") from error
    return settings


def as_started(config: OPCDConfig) -> OPCDConfig:
    """With resume and no divergence chosen, that of the run, with its parameters: the default may have been another."""
    if config.divergence != AUTO:
        return config
    path, plain = Path(config.output_dir), OPCDConfig()
    kept = run_settings(path) if (path / "config.json").is_file() else {}
    names = [name for name in settings_with(belongs="divergence") if name != "divergence"]
    parameters = {name: kept[name] for name in names if name in kept and getattr(config, name) == getattr(plain, name)}
    return replace(config, **parameters, divergence=kept.get("divergence", plain.divergence))


def curve(run: Path) -> dict[str, Any]:
    """Distance to the teacher at each step where that is the loss, and the held-out KLs where they were measured, from
    metrics.jsonl."""
    steps, evaluations = [], []
    for record in read_records(run / "metrics.jsonl"):
        if record["kind"] == "evaluation":
            evaluations.append([record["step"], record.get("own_kl"), record.get("fixed_kl")])
        elif record["kind"] == "step" and record.get("objective") != "nll":
            steps.append([record["step"], record["loss"]])
    return {"steps": steps, "evaluations": evaluations}


def read_records(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, of its first `most` bytes if given; none where there is no file. A killed run may
    leave half a line at the end. Raises InputError for any other line that is no record."""
    lines = path.read_bytes()[:most].split(b"\n") if path.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records += [_record(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError, RecursionError) as error:
            if number < len(lines):
                raise InputError(f"{str(path)!r}, line {number}, is damaged ({error}); remove that line") from error
    return records


def _record(value: Any) -> dict[str, Any]:
    names = ("loss", "own_kl", "fixed_kl")
    numbers = [value[name] for name in names if value.get(name) is not None] if isinstance(value, dict) else [None]
    known = all(type(number) in (int, float) for number in numbers) and type(value.get("step")) is int
    if not known or not isinstance(value.get("kind"), str) or (value["kind"] == "step" and value.get("loss") is None):
        raise TypeError("no record of a step")
    return value

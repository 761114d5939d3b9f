"""What a run's folder says about its training. Needs no torch."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.training.settings import AUTO, OPCDConfig, settings_with, without_gone


def run_settings(run: Path) -> dict[str, Any]:
    """config.json of a run. Raises InputError where there is none, or where it has a setting that is gone."""
    path = run / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(run)!r} is not a run: its config.json cannot be read ({error})") from error
    if not isinstance(settings, dict) or "output_dir" not in settings:
        raise InputError(f"{str(run)!r} is not a run of `opcd train`: its config.json holds other things")
    return without_gone(settings, repr(str(path)), "take it out of that file to go on with what runs do now")


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
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError):  # a killed run may leave half a line
            record = json.loads(line)
            if record.get("kind") == "evaluation":
                evaluations.append([record["step"], record.get("own_kl"), record.get("fixed_kl")])
            elif record.get("kind") == "step" and record.get("objective") != "nll":
                steps.append([record["step"], record["loss"]])
    return {"steps": steps, "evaluations": evaluations}

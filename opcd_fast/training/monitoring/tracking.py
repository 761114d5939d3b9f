"""Experiment trackers, through accelerate: TensorBoard, Weights & Biases, trackio, or the caller's own."""

from __future__ import annotations

import importlib.util
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.runtime import redacted

PROJECT = "opcd"
GROUPS = {"step": "train", "evaluation": "eval"}  # kind of a record -> first part of its numbers' names


def check_installed(names: Sequence[str]) -> None:
    """Raises InputError for a tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"trackers: {name!r} is not installed: pip install {name}")


class Trackers:
    """Sends every number of a run's records to the trackers that `accelerator` was made with (`log_with`).

    folder: the run's; its name is the run's name there, and TensorBoard's files go to `folder/tensorboard/opcd`.
    config: logged once, at the start.
    first: step that the run goes on from. TensorBoard drops what it has from later steps; W&B and trackio show a
    resumed run as another one, in the same group.
    On several ranks accelerate tells them on rank 0 alone.
    """

    def __init__(self, accelerator: Any, folder: Path, config: Mapping[str, Any], first: int) -> None:
        self._accelerator = accelerator
        self._active = bool(accelerator.log_with)
        if not self._active:
            return
        name = folder.resolve().name
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": first + 1} if first else {},
            "wandb": {"name": name, "group": name, "dir": str(folder)},
            "trackio": {"name": name, "group": name},
        }
        try:
            accelerator.init_trackers(PROJECT, flat(config), options)
        except Exception as error:
            raise InputError(f"trackers cannot start: {type(error).__name__}: {redacted(str(error))}") from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Numbers of a record of kind "step" or "evaluation"; others have none."""
        if self._active and record["kind"] in GROUPS:
            self._accelerator.log(numbers_of(record), step=record["step"])

    def close(self) -> None:
        if self._active:
            for tracker in self._accelerator.trackers:  # not `end_training`, which ends the process group as well
                tracker.finish()


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """{"train/loss": …, "train/seconds/rollout": …}: every number but the step itself, nested ones by path."""
    found: dict[str, float] = {}

    def add(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                add(f"{prefix}/{name}", value)
            elif isinstance(value, numbers.Number) and name != "step":
                found[f"{prefix}/{name}"] = value  # type: ignore[assignment]

    add(GROUPS[record["kind"]], record)
    return found


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers, truth values and text; None and lists as text."""
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in config.items()
    }

"""A run's checkpoints: what a step leaves behind, whole or not there, and checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opcd_fast.errors import InputError
from opcd_fast.runtime import read_object, remove_folder, write_folder
from opcd_fast.training.run.provenance import content_of, hash_of

STATE = "state.json"
MANIFEST = "manifest.json"  # size and SHA-256 of the other files, and of the run's own up to this step
WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"
TEACHER = "teacher.safetensors"


@dataclass
class Saved:
    """What a step leaves behind: trained weights, the optimizer's state, a moving teacher's average (or nothing)."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    teacher: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(
    root: Path, step: int, saved: Saved, state: dict[str, Any], keep: int, beside: Iterable[Path] = ()
) -> Path:
    """Write `root/step-NNNNNN` and remove all but the newest `keep` checkpoints.

    beside: files of the run's folder, over `root`, that go with the step; they may grow, but not change, later.
    """
    from safetensors.torch import save_file

    def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def fill(folder: Path) -> None:
        save_file(plain(saved.weights), folder / WEIGHTS)
        if saved.teacher:
            save_file(plain(saved.teacher), folder / TEACHER)
        torch.save(saved.optimizer, folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps({**state, "step": step}, indent=1))
        manifest: dict[str, Any] = {"step": step, "seed": state["identity"].get("seed")}
        manifest["files"] = {file.name: content_of(file) for file in sorted(folder.iterdir())}
        manifest["run"] = {file.name: content_of(file) for file in beside if file.is_file()}
        manifest["sha256"] = hash_of(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    path = root / _name(step)
    write_folder(path, fill)
    for old in list_checkpoints(root)[:-keep]:
        remove_folder(old)
    return path


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    found = (path for path in root.glob("step-*") if any((path / name).is_file() for name in (STATE, MANIFEST)))
    return sorted(found, key=lambda path: (len(path.name), path.name))  # step-1000000 comes after step-999999


def check_whole(path: Path) -> dict[str, Any] | None:
    """The manifest; None where there is none, as in checkpoints of earlier versions, which cannot be checked.

    Raises InputError, which names the file, where one is not what was written, or not of this step.
    """
    if not (path / MANIFEST).is_file():
        return None
    manifest = read_object(path / MANIFEST)
    if manifest.pop("sha256", None) != hash_of(manifest):
        raise InputError(f"{str(path / MANIFEST)!r} is not what was written")
    if path.name != _name(manifest["step"]):
        raise InputError(f"{str(path)!r} holds the checkpoint of another step, {manifest['step']}")
    for file in path.iterdir():
        if file.name not in (*manifest["files"], MANIFEST):
            raise InputError(f"{str(file)!r} does not belong to this checkpoint")
    for folder, files in ((path, manifest["files"]), (path.parent.parent, manifest["run"])):
        for name, written in files.items():
            further = 1 if folder == path else 0  # of the run's files the beginning counts: they grow
            if content_of(folder / name, written["size"] + further) != written:
                raise InputError(f"{str(folder / name)!r} is not what was written")
    return manifest


def load_checkpoint(path: Path) -> tuple[Saved, dict[str, Any]]:
    """What was saved, and the run's state. Raises InputError, which names the file, for a damaged one."""
    from safetensors.torch import load_file

    file = path / STATE
    try:
        state = json.loads(file.read_text())
        state = {"step": int(state["step"]), "identity": dict(state["identity"])}
        weights = load_file(file := path / WEIGHTS)
        teacher = load_file(file := path / TEACHER) if (path / TEACHER).exists() else {}
        optimizer = torch.load(file := path / OPTIMIZER, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{str(file)!r} is damaged ({type(error).__name__}: {error})") from error
    return Saved(weights, optimizer, teacher), state


def _name(step: int) -> str:
    return f"step-{step:06d}"

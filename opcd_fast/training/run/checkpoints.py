"""A run's checkpoints: what a step leaves behind, whole or not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opcd_fast.errors import InputError
from opcd_fast.runtime import write_folder

STATE = "state.json"
WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"
TEACHER = "teacher.safetensors"


@dataclass
class Saved:
    """What a step leaves behind: trained weights, the optimizer's state, a moving teacher's average (or nothing)."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    teacher: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(root: Path, step: int, saved: Saved, state: dict[str, Any], keep: int) -> Path:
    """Write `root/step-NNNNNN` and remove all but the newest `keep` checkpoints."""
    from safetensors.torch import save_file

    def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def fill(folder: Path) -> None:
        save_file(plain(saved.weights), folder / WEIGHTS)
        if saved.teacher:
            save_file(plain(saved.teacher), folder / TEACHER)
        torch.save(saved.optimizer, folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps({**state, "step": step}, indent=1))

    path = root / f"step-{step:06d}"
    write_folder(path, fill)
    for old in list_checkpoints(root)[:-keep]:
        hidden = old.rename(old.with_name(f".{old.name}.old"))  # half of it removed would look like a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)
    return path


def list_checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in root.glob("step-*") if (path / STATE).is_file())


def load_checkpoint(path: Path) -> tuple[Saved, dict[str, Any]]:
    """What was saved, and the run's state. Raises InputError for a damaged checkpoint."""
    from safetensors.torch import load_file

    try:
        state = json.loads((path / STATE).read_text())
        weights = load_file(path / WEIGHTS)
        teacher = load_file(path / TEACHER) if (path / TEACHER).exists() else {}
        optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"checkpoint {str(path)!r} is damaged ({type(error).__name__}: {error}); "
            "remove it to resume from an older one"
        ) from error
    return Saved(weights, optimizer, teacher), state

"""Checkpoints that are either whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opcd_fast.errors import InputError

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


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a scratch folder, then put it in place of `path` by renaming.

    A crash at any moment leaves the old folder or the new one, never a mixture.
    Raises InputError when the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write to {str(path.parent)!r}: {error.strerror}") from error
    aside = scratch.with_name(scratch.name + ".old")
    try:
        scratch.chmod(0o755)
        fill(scratch)
        _sync(scratch)
        if path.exists():
            path.rename(aside)
        scratch.rename(path)
        _sync_folder(path.parent)
    except Exception as error:  # a full disk comes as OSError, or as an error of safetensors' or torch's own
        raise InputError(f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if aside.exists() and not path.exists():
            aside.rename(path)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Atomic replacement of a text file. Raises InputError when it cannot be written."""
    scratch = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
        scratch = ""
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        if scratch:
            Path(scratch).unlink(missing_ok=True)


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


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""What a run keeps on disk: settings, one line per step, held-out sequences, checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opcd_fast.data import Sample
from opcd_fast.errors import InputError
from opcd_fast.runtime import checkpoints as checkpoint
from opcd_fast.training.run.curves import run_settings
from opcd_fast.training.run.resumption import completed
from opcd_fast.training.settings import without_gone

BEST = "best.json"
ANSWERS = ("answers.jsonl", "answers.json")  # drawn once for the whole run, and what that took
SCRATCH = (
    ".step-", ".final.", ".best.", ".config.json.", ".metrics.", ".eval_fixed.", ".kl.png.", ".seconds.png.",
    ".answers.", ".run.", ".prompts.", ".held_out.",
)  # fmt: skip


class RunFolder:
    """The folder `output_dir`. Nothing is written before `start`.

    A run that stopped before its first checkpoint has nothing to lose and is started over.
    Raises InputError: the folder holds a run with a checkpoint (without resume), or none (with resume).
    """

    def __init__(self, path: str | Path, resume: bool) -> None:
        self.path = Path(path)
        self.resume = resume
        self._metrics = self.path / "metrics.jsonl"
        self._checkpoints = self.path / "checkpoints"
        self._saved: int | None = None
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output_dir={str(path)!r} is a file; choose another folder")
        found = bool(checkpoint.list_checkpoints(self._checkpoints))
        if not resume and (found or (self.path / "final").exists()):
            raise InputError(f"output_dir={str(path)!r} already holds a run; use resume, or choose another folder")
        if resume and not found:
            raise InputError(f"resume: no checkpoint in {str(path)!r}; start without resume")

    def start(self, config: Mapping[str, Any]) -> None:
        if checkpoint.list_checkpoints(self._checkpoints):
            raise InputError(f"output_dir={str(self.path)!r} holds the run of an earlier train(); make a new trainer")
        self.clear_leftovers()
        for name in ("metrics.jsonl", "eval_fixed.json", "rollout.json", *ANSWERS):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "best", ignore_errors=True)
        self.write_config(config)

    def write_config(self, config: Mapping[str, Any]) -> None:
        checkpoint.write_text(self.path / "config.json", json.dumps(dict(config), indent=1) + "\n")

    def clear_leftovers(self) -> None:
        """Remove what a killed run was writing."""
        for folder in (self.path, self._checkpoints):
            for scratch in folder.glob(".*"):
                if scratch.name.startswith(SCRATCH):
                    shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink()

    def log(self, record: Mapping[str, Any]) -> None:
        try:
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {str(self._metrics)!r}: {error.strerror or error}") from error

    def save(self, step: int, saved: checkpoint.Saved, identity: dict[str, Any], keep: int) -> None:
        """A checkpoint of `step`, unless the last one is that already. The records before it are on the disk first."""
        if self._saved == step:
            return
        if self._metrics.exists():
            with open(self._metrics, "rb") as file:
                os.fsync(file.fileno())
        checkpoint.save_checkpoint(self._checkpoints, step, saved, {"identity": identity}, keep)
        self._saved = step

    def save_best(self, record: Mapping[str, Any], fill: Callable[[Path], None]) -> None:
        """Replace best/ by what `fill` writes, and note the evaluation it goes back to in best.json."""

        def fill_and_note(folder: Path) -> None:
            fill(folder)
            (folder / BEST).write_text(json.dumps(dict(record), indent=1) + "\n", encoding="utf-8")

        checkpoint.write_folder(self.path / "best", fill_and_note)

    def restore(self, identity: Mapping[str, Any]) -> tuple[int, checkpoint.Saved, list[dict[str, Any]]]:
        """Step and contents of the newest checkpoint, and the records up to it.

        Records of steps after the checkpoint are dropped from the file: these steps will be made again.
        Raises InputError for a damaged checkpoint, one of a run with another identity, or settings that are gone.
        """
        saved, state = checkpoint.load_checkpoint(checkpoint.list_checkpoints(self._checkpoints)[-1])
        where = f"resume: the run in {str(self.path)!r}"
        kept_identity = completed(without_gone(state["identity"], where, "start a new one in another output_dir"))
        if (self.path / "config.json").exists():
            run_settings(self.path)
        for name, value in identity.items():
            before = kept_identity.get(name)
            if before != value:
                raise InputError(
                    f"resume: {name} differs from the run in {str(self.path)!r} ({before!r} there, {value!r} now); "
                    "use the same settings or another output_dir"
                )
        self.clear_leftovers()
        kept = [record for record in self._records() if record["step"] <= state["step"]]
        checkpoint.write_text(self._metrics, "".join(json.dumps(record) + "\n" for record in kept))
        self._saved = state["step"]
        return state["step"], saved, kept

    def _records(self) -> list[dict[str, Any]]:
        """Whole lines; a killed run may leave half of one at the end."""
        records = []
        lines = self._metrics.read_text(encoding="utf-8").split("\n") if self._metrics.is_file() else []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def read_samples(self) -> list[Sample] | None:
        """The held-out sequences of the run being resumed, or None."""
        path = self.path / "eval_fixed.json"
        if not (self.resume and path.is_file()):
            return None
        return [Sample(**row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def write_samples(self, samples: Sequence[Sample]) -> None:
        checkpoint.write_text(self.path / "eval_fixed.json", json.dumps([asdict(sample) for sample in samples]))

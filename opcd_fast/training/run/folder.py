"""What a run keeps on disk: settings, one line per step, held-out sequences, checkpoints."""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from opcd_fast.data import Sample
from opcd_fast.errors import InputError
from opcd_fast.runtime import clear_unfinished, write_folder, write_text
from opcd_fast.training.engines import Ranks
from opcd_fast.training.run import checkpoints
from opcd_fast.training.run.checkpoints import MANIFEST, Saved, list_checkpoints
from opcd_fast.training.run.curves import read_records, run_settings
from opcd_fast.training.run.lock import RunLock
from opcd_fast.training.settings import OPCDConfig, known_settings, settings_with

logger = logging.getLogger("opcd_fast")
BEST = "best.json"
ANSWERS: tuple[str, str] = ("answers.jsonl", "answers.json")  # drawn once for the whole run, and what that took
FIXED = "eval_fixed.json"
T = TypeVar("T")


def identity(config: OPCDConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that goes on must share with its beginning: settings that are not free to change, and `facts` about
    data and weights, as JSON values."""
    settings = {name: getattr(config, name) for name in settings_with(belongs="result")}
    if config.plans_steps:
        settings["steps"] = config.steps
    return json.loads(json.dumps({**settings, **facts}))


def _by_main(method: Callable[..., T]) -> Callable[..., T]:
    """A method of `RunFolder` that rank 0 alone runs; every rank calls it, and gets what it returns or raises."""

    @functools.wraps(method)
    def called(self: RunFolder, *args: Any, **options: Any) -> T:
        return self.ranks.on_main(lambda: method(self, *args, **options))

    return called


class RunFolder:
    """The folder `output_dir`, which rank 0 of `ranks` (None: this process) reads and writes. Nothing is written before
    `start`.

    A run that stopped before its first checkpoint has nothing to lose and is started over. From `start` or `restore` on
    no other process may write there, until `close`.
    Raises InputError: the folder holds a run with a checkpoint (without resume), or none (with resume).
    """

    def __init__(self, path: str | Path, resume: bool, ranks: Ranks | None = None) -> None:
        self.path = Path(path)
        self.resume = resume
        self.ranks = ranks or Ranks(alone=True)
        self._metrics = self.path / "metrics.jsonl"
        self._checkpoints = self.path / "checkpoints"
        self._saved: int | None = None
        self._lock = RunLock(self.path)
        self._check()

    @_by_main
    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output_dir={str(self.path)!r} is a file; choose another folder")
        found = bool(list_checkpoints(self._checkpoints))
        if not self.resume and (found or (self.path / "final").exists()):
            raise InputError(f"output_dir={str(self.path)!r} already holds a run; use resume, or choose another folder")
        if self.resume and not found:
            raise InputError(f"resume: no checkpoint in {str(self.path)!r}; start without resume")

    @_by_main
    def start(self, config: Mapping[str, Any]) -> None:
        self._lock.take()
        if list_checkpoints(self._checkpoints):
            raise InputError(f"output_dir={str(self.path)!r} holds the run of an earlier train(); make a new trainer")
        clear_unfinished(self.path)
        for name in ("metrics.jsonl", FIXED, "rollout.json", *ANSWERS):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "best", ignore_errors=True)
        self._write_config(config)  # not the collective one: the other ranks are not in here

    def _write_config(self, config: Mapping[str, Any]) -> None:
        write_text(self.path / "config.json", json.dumps(dict(config), indent=1) + "\n")

    write_config = _by_main(_write_config)

    def close(self) -> None:
        """Others may write there again. Not collective."""
        self._lock.release()

    @_by_main
    def log(self, record: Mapping[str, Any]) -> None:
        try:
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {str(self._metrics)!r}: {error.strerror or error}") from error

    @_by_main
    def save(self, step: int, saved: Saved, made_of: dict[str, Any], keep: int) -> None:
        """A checkpoint of `step`, unless the last one is that already. The records before it are on the disk first."""
        if self._saved == step:
            return
        if self._metrics.exists():
            with open(self._metrics, "rb") as file:
                os.fsync(file.fileno())
        beside = [self.path / name for name in ("metrics.jsonl", FIXED, *ANSWERS)]
        checkpoints.save_checkpoint(self._checkpoints, step, saved, {"identity": made_of}, keep, beside)
        self._saved = step

    @_by_main
    def save_best(self, record: Mapping[str, Any], fill: Callable[[Path], None]) -> None:
        """Replace best/ by what `fill` writes, and note the evaluation it goes back to in best.json."""

        def fill_and_note(folder: Path) -> None:
            fill(folder)
            (folder / BEST).write_text(json.dumps(dict(record), indent=1) + "\n", encoding="utf-8")

        write_folder(self.path / "best", fill_and_note)

    @_by_main
    def restore(self, wanted: Mapping[str, Any], steps: int) -> tuple[int, Saved, list[dict[str, Any]]]:
        """Step and contents of the newest checkpoint, and the records up to it. wanted: what its `identity` must be.
        steps: how many it may have.

        Records after the checkpoint are dropped from the file: these steps will be made again.
        Raises InputError for a damaged checkpoint, or one of a run with another identity.
        """
        self._lock.take()
        saved, state, records = self._newest()
        before = {**identity(OPCDConfig(), {}), **state["identity"]}  # defaults are what its version did
        if (self.path / "config.json").exists():
            run_settings(self.path)
        gone = {name: value for name, value in before.items() if name not in wanted}
        known_settings(gone, f"resume: the run in {str(self.path)!r}", "use another output_dir")
        for name, value in wanted.items():
            if before.get(name) != value:
                raise InputError(
                    f"resume: {name} differs from the run in {str(self.path)!r} ({before.get(name)!r} there, {value!r} "
                    "now); use the same settings or another output_dir"
                )
        if state["step"] > steps:
            raise InputError(f"resume: the run has made {state['step']} steps already, steps={steps}; give more")
        clear_unfinished(self.path)
        kept = [record for record in records if record["step"] <= state["step"]]
        write_text(self._metrics, "".join(json.dumps(record) + "\n" for record in kept))
        self._saved = state["step"]
        return state["step"], saved, kept

    def _newest(self) -> tuple[Saved, dict[str, Any], list[dict[str, Any]]]:
        """The newest checkpoint, and the run's records up to it or further."""
        damaged: list[Path] = []
        first: InputError | None = None
        for path in reversed(list_checkpoints(self._checkpoints)):
            try:
                found = self._checked(path)
            except InputError as error:
                first = first or error
                damaged.append(path)
                continue
            if first is None:
                return found
            moves = [shlex.join(["mv", str(old), str(old.with_name(f"damaged-{old.name}"))]) for old in damaged]
            raise InputError(
                f"resume: {first}; {path.name} is whole: `{' && '.join(moves)}`, and --resume goes on from that"
            )
        manifest = damaged[0] / MANIFEST
        remedy = f", or, to go on with it as it is, remove {str(manifest)!r}" if manifest.exists() else ""
        raise InputError(f"resume: {first}; no other checkpoint is whole: put the file back from a copy{remedy}")

    def _checked(self, path: Path) -> tuple[Saved, dict[str, Any], list[dict[str, Any]]]:
        manifest, most = checkpoints.check_whole(path), None
        if manifest is None:
            logger.warning("%s has no %s, as of an earlier version: its files cannot be checked", path, MANIFEST)
        else:
            most = manifest["run"].get(self._metrics.name, {"size": 0})["size"]
        return *checkpoints.load_checkpoint(path), read_records(self._metrics, most)

    @_by_main
    def read_samples(self) -> list[Sample] | None:
        """The held-out sequences of the run being resumed, or None."""
        path = self.path / FIXED
        if not (self.resume and path.is_file()):
            return None
        try:
            kept = [Sample(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
            if not any(one.response for one in kept):
                raise TypeError("no token ids in it")
            return kept
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"resume: {str(path)!r} cannot be read ({error}); start the run anew") from error

    @_by_main
    def write_samples(self, samples: Sequence[Sample]) -> None:
        write_text(self.path / FIXED, json.dumps([asdict(sample) for sample in samples]))

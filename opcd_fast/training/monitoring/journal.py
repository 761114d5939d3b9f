"""Everything that is told while a run goes on: records to disk, trackers, callbacks and display; warnings; pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opcd_fast.data import Sample
from opcd_fast.training.engines import Ranks
from opcd_fast.training.monitoring.health import warning_before_training, warnings_of
from opcd_fast.training.monitoring.held_out import in_words
from opcd_fast.training.monitoring.plots import plot_run
from opcd_fast.training.monitoring.progress import Progress, clock, seconds_ahead, seconds_by_part
from opcd_fast.training.monitoring.tracking import Trackers
from opcd_fast.training.run import RunFolder, best
from opcd_fast.training.settings import OPCDConfig

logger = logging.getLogger("opcd_fast")


@dataclass
class TrainResult:
    """What a run did. `history` has one record per step, `evaluations` one per held-out evaluation, `warnings` one per
    sign of trouble. `best_step` is the step of the best evaluation after the first weights, `steps` how many were made:
    fewer than asked for with `stopped_early`."""

    output_dir: str
    steps: int
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    stopped_early: bool = False


class Journal:
    """A run's records, those of its beginning included, and whoever is told about new ones.

    records, step: those of the run's beginning, and how many steps it made. accelerator: see `Trackers`.
    history, evaluations, warnings: records by kind. Use as a context manager: leaving it closes display and trackers.
    Every rank has one, with the same records; rank 0's writes and tells.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: OPCDConfig,
        records: Sequence[dict[str, Any]],
        step: int,
        accelerator: Any,
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
        ranks: Ranks,
        quiet: bool,
    ) -> None:
        self._folder, self._config, self._callbacks, self._ranks = folder, config, callbacks, ranks
        self._trackers = ranks.together(lambda: Trackers(accelerator, folder.path, config.public(), step))
        self._progress = Progress(config.steps, step, quiet)
        self._draws = config.plots and ranks.main
        self._made = 0
        self._teacher_length: float | None = None  # tokens of the teacher's held-out answers, once they are there
        self.history = [record for record in records if record["kind"] == "step"]
        self.evaluations = [record for record in records if record["kind"] == "evaluation"]
        self.warnings = [record for record in records if record["kind"] == "warning"]

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        self._trackers.close()

    def know(self, fixed: Sequence[Sample]) -> None:
        """The teacher's held-out answers, whose length is what is normal."""
        if fixed:
            self._teacher_length = sum(len(sample.response) for sample in fixed) / len(fixed)

    def step(self, record: dict[str, Any]) -> None:
        """Note a step, and what its record warns of."""
        self._note(record, self.history)
        self._progress.step(record)
        self._made += 1
        told, most = {warning["name"] for warning in self.warnings}, self._config.max_new_tokens
        grown = [one for one in self.history if one.get("max_new_tokens", most) == most]  # shorter ones are meant to be
        self._warn(record, warnings_of(grown, told, self._teacher_length, self._config.top_p == 1))

    def evaluation(self, record: dict[str, Any]) -> None:
        """Note a held-out evaluation, what that of the first weights warns of, and draw the run so far."""
        self._note(record, self.evaluations)
        self._progress.evaluation(in_words(record), record)
        self._warn(record, warning_before_training(record, self._config))
        self.draw()

    def foresee(self, seconds: Mapping[str, float], answers: int) -> None:
        """Say how long the run will take, see `seconds_ahead`."""
        ahead = clock(seconds_ahead(seconds, answers, self._config))
        self._progress.note(f"at most about {ahead} for {self._config.steps} steps, as this first evaluation went")

    def show(self, lines: Iterable[str]) -> None:
        """For people alone: nothing of it is kept."""
        self._progress.note("\n".join(lines))

    def _warn(self, record: dict[str, Any], found: Iterable[tuple[str, str]]) -> None:
        for name, message in list(found):
            self.warnings.append({"step": record["step"], "kind": "warning", "name": name, "message": message})
            self._folder.log(self.warnings[-1])
            if self._ranks.main:
                logger.warning("%s", message)

    @property
    def enough(self) -> bool:
        """Whether the evaluations ask for an early stop."""
        config = self._config
        return best.stops_early(
            self.evaluations, config.best_by, config.early_stop_patience, config.early_stop_delta
        )

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation of trained weights so far."""
        return best.best_step(self.evaluations, self._config.best_by)

    def finish(self, step: int, seconds: float) -> TrainResult:
        """The end of a run after `step` steps: pictures, where the time went, and the result."""
        self.draw()
        if self._made:
            self._progress.note(seconds_by_part(self.history[-self._made :]))
        early = step < self._config.steps
        if early:
            self._progress.note(f"stopped early after step {step}: {self._config.best_by} improves no more")
        return TrainResult(
            self._config.output_dir, step, seconds, self.history, self.evaluations, self.warnings, self.best_step, early
        )

    def draw(self) -> None:
        """A picture that cannot be written is no reason to end a run: it is said once."""
        if not self._draws:
            return
        try:
            plot_run(Path(self._config.output_dir), self.history, self.evaluations)
        except OSError as error:
            self._draws = False
            logger.warning("plots cannot be written: %s", error)

    def _note(self, record: dict[str, Any], records: list[dict[str, Any]]) -> None:
        def tell() -> None:
            self._trackers.log(record)
            for callback in self._callbacks:
                callback(record)

        self._folder.log(record)
        records.append(record)
        self._ranks.on_main(tell)

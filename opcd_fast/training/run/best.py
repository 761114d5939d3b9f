"""Which evaluation was the best so far, and whether to stop: read off the evaluations' records.

Nothing but the records is looked at, and a checkpoint has all records up to it. So a resumed run knows what the run
that was killed knew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig

MEASURES = {"kl": "own_kl", "fixed_kl": "fixed_kl", "score": "score"}  # best_by -> field of the record


def check_measured(config: OPCDConfig, evaluates: bool, scores: bool) -> None:
    """Raises InputError where nothing would tell which weights are best."""
    if (config.save_best or config.early_stop_patience) and not evaluates:
        raise InputError("save_best and early_stop_patience need held-out evaluations; give eval_prompts")
    if config.best_by == "score" and not scores:
        raise InputError("best_by='score' needs a scorer")


def loss_of(record: Mapping[str, Any], best_by: str) -> float:
    """The measure, as a number that is better when lower."""
    value = record[MEASURES[best_by]]
    return -value if best_by == "score" else value


def best_step(evaluations: Sequence[Mapping[str, Any]], best_by: str) -> int | None:
    """Step of the best evaluation of trained weights, the first of equal ones; None without any."""
    trained = [record for record in evaluations if record["step"] > 0]
    best = min(trained, key=lambda record: loss_of(record, best_by), default=None)
    return None if best is None else best["step"]


def evaluations_without_gain(evaluations: Sequence[Mapping[str, Any]], best_by: str, delta: float | None) -> int:
    """How many evaluations ago the measure last improved by more than `delta` (None: its standard error then).

    Improvements are counted from the last one that was large enough, so that many small ones add up.
    """
    if not evaluations:
        return 0
    mark, since = loss_of(evaluations[0], best_by), 0
    for record in evaluations[1:]:
        noise = record[f"{MEASURES[best_by]}_error"] if delta is None else delta
        if loss_of(record, best_by) < mark - noise:
            mark, since = loss_of(record, best_by), 0
        else:
            since += 1
    return since


def stops_early(evaluations: Sequence[Mapping[str, Any]], best_by: str, patience: int, delta: float | None) -> bool:
    """Whether `patience` evaluations in a row (0: never) brought no improvement larger than noise."""
    return bool(patience) and evaluations_without_gain(evaluations, best_by, delta) >= patience

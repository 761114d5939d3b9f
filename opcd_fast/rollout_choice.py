"""What a sampler decided for itself: how candidates are compared, and where the decision is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from opcd_fast.errors import InputError
from opcd_fast.launch import launched_rank

Answers = Sequence[tuple[Sequence[int], Sequence[float]]]
Name = TypeVar("Name", bound=Hashable)

# Largest difference of a log-probability that rounding explains; of single tokens, in nats.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
REPEATS = 2


def agree(ours: Answers, theirs: Answers, dtype: torch.dtype) -> tuple[bool, float]:
    """Whether two engines' most probable answers are one up to rounding, and the largest difference in nats.

    Answers are compared up to the first token that differs, that one included: at a tie both took the most probable
    token, whose log-probability is then the same.
    """
    worst = 0.0
    for (ids, logprobs), (other_ids, other_logprobs) in zip(ours, theirs, strict=True):
        for a, b, p, q in zip(ids, other_ids, logprobs, other_logprobs):
            difference = abs(p - q)
            worst = max(worst, difference if difference == difference else float("inf"))
            if a != b:
                break
    return worst <= TOLERANCE.get(dtype, 2e-3), worst


def faster(
    candidates: dict[Name, Callable[[int], object]], *, few: int, many: int, wanted: int, device: torch.device
) -> tuple[Name, dict[Name, float]]:
    """The candidate that is estimated to be fastest for `wanted` tokens, and each one's seconds.

    Each runs with `few` and with `many` tokens, in turns, the best of two counting; what a token costs follows from
    the difference.
    """
    lengths = (few, many) if many > few else (few,)
    best: dict[Any, float] = {}
    for _ in range(REPEATS):
        for name, run in candidates.items():
            for length in lengths:
                _wait(device)
                started = time.perf_counter()
                run(length)
                _wait(device)
                took = time.perf_counter() - started
                best[name, length] = min(best.get((name, length), took), took)
    seconds = {}
    for name in candidates:
        first, last = best[name, lengths[0]], best[name, lengths[-1]]
        per_token = max(last - first, 0.0) / max(lengths[-1] - lengths[0], 1)
        seconds[name] = last + per_token * (wanted - lengths[-1])
    return min(seconds, key=lambda name: seconds[name]), seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Choice:
    """Decisions by name with their reasons, kept in a JSON file (or nowhere, with None)."""

    def __init__(
        self,
        file: str | Path | None = None,
        values: dict[str, Any] | None = None,
        reasons: dict[str, str] | None = None,
    ) -> None:
        self.values, self._reasons = dict(values or {}), dict(reasons or {})
        self._file = None if file is None else Path(file)
        self._written = dict(self.values)

    @classmethod
    def of_file(cls, file: str | Path) -> Choice:
        """What an earlier run decided; nothing where it did not get that far. Raises InputError for a damaged file."""
        if not Path(file).is_file():
            return cls(file)
        try:
            kept = json.loads(Path(file).read_text(encoding="utf-8"))
            return cls(file, dict(kept["values"]), dict(kept["reasons"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{str(file)!r} cannot be read ({error}); delete it to decide anew") from error

    def fixed(self, name: str, given: Any, reason: str) -> Any:
        """What the caller gave, else what the file holds, else None."""
        if given is not None:
            return self.set(name, given, f"{reason} was given")
        return self.values.get(name)

    def set(self, name: str, value: Any, reason: str) -> Any:
        self.values[name], self._reasons[name] = value, reason
        return value

    def write(self) -> None:
        """Only when something is new, where the folder exists, and by the first of several processes."""
        if self._file is None or self._written == self.values or not self._file.parent.is_dir() or launched_rank():
            return
        from opcd_fast.checkpoint import write_text

        write_text(self._file, json.dumps({"values": self.values, "reasons": self._reasons}, indent=1) + "\n")
        self._written = dict(self.values)

    def explain(self) -> str:
        return "\n".join(f"{name}: {value} ({self._reasons.get(name)})" for name, value in self.values.items())

"""What a user calls right: a pattern, or a Python function that gives shares."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.data import Message
from opcd_fast.errors import InputError
from opcd_fast.training import scorer


@dataclass(frozen=True)
class Scorer:
    """A behaviour: `score(messages, answer, row)` in [0, 1]. The function is as in `opcd_fast.training.scorer`."""

    name: str
    kind: str  # "regex" or "function"
    function: scorer.Scorer

    def __call__(self, messages: Sequence[Message], answer: str, row: Mapping[str, Any]) -> float:
        """Raises InputError when the user's function fails or gives no number in [0, 1]."""
        try:
            score = self.function([dict(message) for message in messages], answer, row)
            value = float(score)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise InputError(f"scorer {self.name!r} failed on {answer!r:.60}: {said}") from error
        if not 0 <= value <= 1:  # refuses NaN too
            raise InputError(f"scorer {self.name!r} gave {score!r} for {answer!r:.60}; it must be from 0 to 1")
        return value


def by_pattern(pattern: str) -> Scorer:
    """1 where the regular expression is found in the answer. Raises InputError for one that is not valid."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"regex={pattern!r} is not a regular expression: {error}") from error
    return Scorer(pattern, "regex", lambda messages, answer, row: float(compiled.search(answer) is not None))


def by_function(name: str) -> Scorer:
    """`module:function`, the same as a run's `scorer`, here from 0 to 1. Raises InputError."""
    return Scorer(name, "function", scorer.load_scorer(name))

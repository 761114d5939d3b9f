"""What a user calls right: a pattern, a Python function, or a task."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.messages import Message


@dataclass(frozen=True)
class Scorer:
    """A behaviour: `score(answer, messages)` in [0, 1]."""

    name: str
    kind: str  # "regex" or "function"
    function: Callable[[str, Sequence[Message]], float | bool]

    def __call__(self, answer: str, messages: Sequence[Message]) -> float:
        """Raises InputError when the user's function fails or gives no number in [0, 1]."""
        try:
            score = self.function(answer, messages)
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
    return Scorer(pattern, "regex", lambda answer, messages: compiled.search(answer) is not None)


def by_function(name: str) -> Scorer:
    """`module:function`, found in the current folder or among the installed packages.

    The function gets the answer's text and, if it takes two arguments, the prompt's messages. Raises InputError.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise InputError(f"scorer={name!r} must be module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        function: Any = getattr(importlib.import_module(module_name), attribute)
        count = len(inspect.signature(function).parameters)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"scorer={name!r} cannot be used: {error}") from error
    finally:
        sys.path.remove(here)
    if count not in (1, 2):
        raise InputError(f"scorer={name!r} takes {count} arguments; it must take the answer, or answer and messages")
    return Scorer(name, "function", function if count == 2 else lambda answer, messages: function(answer))

"""What counts as the behaviour: a pattern, or a function of the answer."""

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
class Behaviour:
    """`function(answer, messages)` gives a score from 0 to 1; `name` is what a comparison remembers."""

    name: str
    function: Callable[[str, Sequence[Message]], Any]

    def __call__(self, answer: str, messages: Sequence[Message]) -> float:
        """Raises InputError when the function fails or gives no number from 0 to 1."""
        try:
            value = float(self.function(answer, messages))
        except Exception as error:
            raise InputError(f"{self.name!r} failed on {answer!r:.60}: {type(error).__name__}: {error}") from error
        if not 0 <= value <= 1:  # refuses NaN too
            raise InputError(f"{self.name!r} gave {value} for {answer!r:.60}; it must be from 0 to 1")
        return value


def by_pattern(pattern: str) -> Behaviour:
    """1 where the regular expression is found in the answer. Raises InputError for one that is not valid."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"regex={pattern!r} is not a regular expression: {error}") from error
    return Behaviour(f"regex {pattern}", lambda answer, messages: compiled.search(answer) is not None)


def by_function(name: str) -> Behaviour:
    """`module:function`, found in the current folder or among the installed packages.

    The function gets the answer's text and, if it takes two arguments, the prompt's messages. Raises InputError.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(f"scorer={name!r} must be module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        function: Any = getattr(importlib.import_module(module_name), attribute)
        count = len(inspect.signature(function).parameters)
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise InputError(f"scorer={name!r} cannot be used: {error}") from error
    finally:
        sys.path.remove(here)
    if count not in (1, 2):
        raise InputError(f"scorer={name!r} takes {count} arguments; it must take the answer, or answer and messages")
    return Behaviour(name, function if count == 2 else lambda answer, messages: function(answer))

"""A user's own measure of an answer, from Python or by name, and its mean over held-out answers."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opcd_fast.data import Prompt
from opcd_fast.errors import InputError
from opcd_fast.rollout import Completion
from opcd_fast.runtime import mean_and_error, wilson

Scorer = Callable[[list[dict[str, Any]], str, Mapping[str, Any]], float]
"""(the prompt's messages, the answer's text, the prompt's row as it was given) -> a number, better when higher."""


def load_scorer(name: str) -> Scorer:
    """The function behind "module:function"; modules in the current folder are found. Raises InputError."""
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise InputError(f"scorer={name!r} must be module:function, such as my_scores:is_polite")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise InputError(f"scorer={name!r} cannot be loaded: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise InputError(f"scorer={name!r} is a {type(found).__name__}, not a function")
    try:
        inspect.signature(found).bind([], "", {})
    except TypeError as error:
        raise InputError(f"scorer={name!r} must take the messages, the answer and the row ({error})") from error
    except ValueError:  # one that does not say what it takes
        pass
    return found


def pattern_scorer(pattern: str) -> Scorer:
    """1 where the regular expression is found in the answer, white space around it apart. Raises InputError."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"regex={pattern!r} is not a regular expression: {error}") from error
    return lambda messages, answer, row: float(compiled.search(answer.strip()) is not None)


def scores_of(
    scorer: Scorer,
    messages: Sequence[Sequence[Mapping[str, Any]]],
    answers: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    name: str | None = None,
    share: bool = False,
) -> list[float]:
    """One score for each answer. share: each must be from 0 to 1.

    Raises InputError: the scorer raises, or returns something that is no finite number.
    """
    who = "scorer" if name is None else f"scorer {name!r}"
    scores = []
    for index, (shown, answer, row) in enumerate(zip(messages, answers, rows, strict=True)):
        try:
            value = float(scorer([dict(message) for message in shown], answer, row))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{who} failed on held-out answer {index} ({reason}); mend the scorer") from error
        if not math.isfinite(value) or (share and not 0 <= value <= 1):
            wanted = "a number from 0 to 1" if share else "a finite number"
            raise InputError(f"{who} gave {value} for held-out answer {index}; it must give {wanted}")
        scores.append(value)
    return scores


class HeldOutScore:
    """A scorer together with the held-out prompts.

    name: what a continued run compares; a function's module and name.
    """

    def __init__(self, scorer: Scorer, name: str, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        self.name = name
        self._scorer, self._tokenizer = scorer, tokenizer
        self._messages = [list(prompt.chat) for prompt in prompts]
        self._rows = [p.row for p in prompts]

    @classmethod
    def make(
        cls, scorer: Scorer | None, name: str | None, tokenizer: Any, prompts: Sequence[Prompt]
    ) -> HeldOutScore | None:
        """From a function or a name, whichever is given. Raises InputError for both, or without held-out prompts."""
        if scorer is None and name is None:
            return None
        if scorer is not None and name is not None:
            raise InputError("scorer is given as a function and in the settings; drop one of them")
        if not prompts:
            raise InputError("scorer needs held-out evaluations; give eval_prompts, and set eval_every")
        if scorer is None:
            assert name is not None
            return cls(load_scorer(name), name, tokenizer, prompts)
        if not callable(scorer):
            raise InputError(f"scorer is a {type(scorer).__name__}; give a function, or set config.scorer to its name")
        kind = scorer if hasattr(scorer, "__qualname__") else type(scorer)
        return cls(scorer, f"{kind.__module__}:{kind.__qualname__}", tokenizer, prompts)

    def __call__(self, answers: Sequence[Completion]) -> dict[str, float]:
        """Mean score, its standard error, and a 95 % interval (Wilson's where every score is 0 or 1, else normal)."""
        scores = scores_of(self._scorer, self._messages, self._texts(answers), self._rows)
        mean, deviation = mean_and_error(scores)
        low, high = mean - 1.96 * deviation, mean + 1.96 * deviation
        if set(scores) <= {0.0, 1.0}:
            low, high = wilson(round(sum(scores)), len(scores))
        return {"score": mean, "score_error": deviation, "score_low": low, "score_high": high}

    def shares(self, answers: Sequence[Completion]) -> list[float]:
        """The score of each answer, one to every held-out prompt in order. Raises InputError for one not in 0 .. 1."""
        return scores_of(self._scorer, self._messages, self._texts(answers), self._rows, name=self.name, share=True)

    def _texts(self, answers: Sequence[Completion]) -> list[str]:
        return [self._tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip() for answer in answers]

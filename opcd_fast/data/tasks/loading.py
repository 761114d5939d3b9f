"""Tasks with honest scorers, by name: what lessons are learned from, and what they are judged by."""

from __future__ import annotations

import json
from typing import Any

from opcd_fast.data.tasks.episode import Task
from opcd_fast.errors import InputError

TASKS = {
    "frozen-lake": "textarena's game on a 3 x 3 board, several turns",
    "frozen-lake-gymnasium": "the same on gymnasium's FrozenLake, fewer packages",
    "sokoban": "textarena's game on a 6 x 6 board, several turns",
    "math": "math:FILE, rows as DAPO-Math-17K has them",
    "choice": "choice:FILE, rows as MedMCQA has them",
    "yes-no": "yes-no:FILE, rows of prompt and label",
    "reasoning": "reasoning:NAME, a generator of the package reasoning-gym",
    "instructions": "short instructions whose following can be checked by a program",
}


def load_task(name: str, **options: Any) -> Task:
    """The task called `name`, or "name:FILE" for those that read a file; options are those of the task's own maker.

    Raises InputError: no such task, a file or a package that is missing, an option that the task has not.
    """
    kind, colon, what = name.partition(":")
    needs = TASKS.get(kind, "").startswith(f"{kind}:")
    if kind not in TASKS or needs != bool(what) or (colon and not what):
        listed = "; ".join(f"{text if text.startswith(key + ':') else key}" for key, text in TASKS.items())
        raise InputError(f"task {name!r} is unknown or incomplete; use one of: {listed}")
    arguments = (what,) if needs else ()
    try:
        return _maker(kind)(*arguments, **options)
    except TypeError as error:
        if options and "argument" in str(error):
            raise InputError(f"task {name!r}: {str(error).partition('() ')[2] or error}") from error
        raise


def options_of(text: str | None) -> dict[str, Any]:
    """A task's options from JSON. Raises InputError."""
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f'task_options={text!r} must be JSON, such as {{"size": 4}}') from error
    if not isinstance(options, dict):
        raise InputError(f'task_options={text!r} must be a JSON object, such as {{"size": 4}}')
    return options


def _maker(kind: str) -> Any:
    if kind == "math":
        from opcd_fast.data.tasks.math import math_file

        return math_file
    if kind in ("choice", "yes-no"):
        from opcd_fast.data.tasks.choice import choice_file, yes_no_file

        return choice_file if kind == "choice" else yes_no_file
    if kind == "reasoning":
        from opcd_fast.data.tasks.reasoning import Reasoning

        return Reasoning
    if kind == "instructions":
        from opcd_fast.data.tasks.instructions import Instructions

        return Instructions
    if kind == "sokoban":
        from opcd_fast.data.tasks.games import Sokoban

        return Sokoban
    from opcd_fast.data.tasks.games import FrozenLake, GymnasiumFrozenLake

    return FrozenLake if kind == "frozen-lake" else GymnasiumFrozenLake

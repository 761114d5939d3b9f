"""Sums of small numbers: an ability that needs no package to measure."""

from __future__ import annotations

import re
from functools import partial

from opcd_fast.data import Message
from opcd_fast.data.tasks.episode import Questions, as_user

NUMBERS = range(2, 21)
SOLVED = ((3, 2), (4, 7))  # shown before each question: without them a small model talks about addition


def arithmetic() -> Questions:
    """All sums of two numbers from 2 to 20. Right is an answer whose last number is the sum."""
    shown: list[Message] = []
    for a, b in SOLVED:
        shown += [*as_user(_question(a, b)), {"role": "assistant", "content": f"{a} + {b} = {a + b}"}]
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS if (a, b) not in SOLVED]
    return Questions(
        "arithmetic", [([*shown, *as_user(_question(a, b))], partial(ends_in, number=a + b)) for a, b in pairs]
    )


def _question(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def ends_in(text: str, number: int) -> bool:
    """Whether the last number in the text is this one."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return bool(found) and float(found[-1]) == number

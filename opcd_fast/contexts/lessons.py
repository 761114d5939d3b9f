"""Lessons: what a model writes down after a problem, and how lessons become notes of a bounded length.

The pipeline is the paper's (arXiv 2602.12275, section 4.1): problems are solved without experience, the model writes
transferable lessons from its own attempts, lessons are collected line by line, and the oldest leave whole when the
notes are full.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from opcd_fast.data import Message, repeats
from opcd_fast.data.tasks import Played, as_user, final_part
from opcd_fast.errors import InputError

MARK = "- LESSON:"
_LESSON = re.compile(r"(?im)^[ \t>*]*(?:[-•]|\d+[.)])?[ \t*]*lesson[ \t]*\d*[ \t*]*:[ \t*]*(\S.*?)[ \t*]*$")
HEAD = "Notes from earlier experience. Use what fits.\n"
TRACES = "Earlier attempts at problems of this kind.\n"
Part = TypeVar("Part")

WRITE = """\
Here is a problem and how somebody tried to solve it.

{attempt}

Write down what would help with OTHER problems of this kind: rules that hold, steps that work, mistakes to avoid. \
Leave out this problem's own numbers, positions and answer. Write at most {most} lessons, each on one line that begins \
with `{mark}`."""

# Two worked examples of the form; small models do not take it from the words alone.
EXAMPLES = (
    (
        "## Problem\nA shop sells 3 apples for 2 coins. What do 12 cost?\n\n## Attempt\n12 / 2 = 6, so 6 coins.",
        ("Find out what one unit of the goods costs before multiplying.", "Check which number is divided by which."),
    ),
    (
        "## Turn 1\nThe door is red. Moves: [open], [knock].\n\n## Attempt\n[open]\n\n## Outcome\nYou lost: locked.",
        ("Try the careful move first when nothing says that the other one is safe.",),
    ),
)

WRITE_AFTER = """

These lessons are known already, so do not repeat them:
{known}"""

MERGE = """\
These lessons were written at different times. Some say the same thing, some are wrong in general.

{lessons}

Write them again as a shorter list: join what belongs together, drop what is doubtful, keep what is useful. Each \
lesson on one line that begins with `{mark}`."""


def ask_for_lessons(played: Played, most: int, known: Sequence[str] = ()) -> list[Message]:
    """The question that makes a model write lessons from an attempt. Right answers are not in it."""
    parts = []
    for number, turn in enumerate(played.turns, start=1):
        head = f"Turn {number}" if len(played.turns) > 1 else "Problem"
        parts.append(f"## {head}\n{turn.messages[-1]['content']}\n\n## Attempt\n{final_part(turn.answer) or '(none)'}")
    if played.feedback:
        parts.append(f"## Outcome\n{played.feedback}")
    more = WRITE_AFTER.format(known=as_lines(known)) if known else ""
    examples: list[Message] = []
    for attempt, lessons in EXAMPLES:
        examples += as_user(WRITE.format(attempt=attempt, most=most, mark=MARK))
        examples.append({"role": "assistant", "content": as_lines(lessons[:most])})
    return examples + as_user(WRITE.format(attempt="\n\n".join(parts), most=most, mark=MARK) + more)


def ask_to_merge(lessons: Sequence[str]) -> list[Message]:
    return as_user(MERGE.format(lessons=as_lines(lessons), mark=MARK))


def lessons_in(answer: str, most: int | None = None) -> list[str]:
    """Lessons of an answer: the lines that are marked as such, thoughts left out. [] when there is none."""
    found = [" ".join(text.split()) for text in _LESSON.findall(final_part(answer))]
    return [text for text in found if text][:most]


def as_lines(lessons: Sequence[str]) -> str:
    return "\n".join(f"{MARK} {lesson}" for lesson in lessons)


def as_notes(lessons: Sequence[str]) -> str:
    """The context that lessons make; "" for none."""
    return HEAD + "".join(f"- {lesson}\n" for lesson in lessons) if lessons else ""


def lessons_of_notes(text: str) -> list[str]:
    """The lessons of `as_notes`. Raises InputError for a text that it did not write."""
    if not text.strip():
        return []
    if not text.startswith(HEAD):
        raise InputError("these notes were not written by `opcd accumulate`; give a file of its folder `notes`")
    return [line[2:] for line in text[len(HEAD) :].splitlines() if line.startswith("- ")]


def as_traces(records: Sequence[Mapping[str, Any]]) -> str:
    """The context that raw attempts make, to compare with the lessons drawn from them (arXiv 2602.12275, table 6).

    records: of `opcd extract`. What was asked and answered at every turn, thoughts included, and how it ended.
    """
    text = TRACES
    for record in records:
        turns = [f"Problem: {turn['messages'][-1]['content']}\nAttempt: {turn['answer']}" for turn in record["turns"]]
        outcome = [f"Outcome: {record['feedback']}"] if record["feedback"] else []
        text += "\n" + "\n".join(turns + outcome) + "\n"
    return text


def within_budget(
    parts: Sequence[Part], max_tokens: int, count: Callable[[str], int], as_text: Callable[[Sequence[Part]], str]
) -> list[Part]:
    """The newest of lessons or attempts, in order, whose text has at most `max_tokens` tokens.

    count: tokens of a text. Parts leave whole, the oldest first; a newest one that does not fit by itself leaves too.
    """
    kept: list[Part] = []
    for part in reversed(parts):
        if count(as_text([part, *kept])) > max_tokens:
            if kept:
                break  # what is older would leave first
            continue
        kept.insert(0, part)
    return kept


def without_similar(lessons: Sequence[str], threshold: float) -> list[str]:
    """Lessons in order, without those that repeat an earlier one (`opcd_fast.data.duplicates`, 1: the same words)."""
    return [lesson for lesson, same in zip(lessons, repeats(lessons, threshold), strict=True) if same is None]

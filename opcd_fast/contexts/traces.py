"""Raw attempts as a context, to compare with the lessons that were drawn from them (arXiv 2602.12275, table 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opcd_fast.errors import InputError

HEAD = "Earlier attempts at problems of this kind.\n"


def as_trace(record: Mapping[str, Any]) -> str:
    """One attempt of `opcd extract`: what was asked and answered at every turn, thoughts included, and how it ended."""
    parts = [f"Problem: {turn['messages'][-1]['content']}\nAttempt: {turn['answer']}" for turn in record["turns"]]
    return "\n".join([*parts, *([f"Outcome: {record['feedback']}"] if record["feedback"] else [])])


def traces_within_budget(
    records: Sequence[Mapping[str, Any]], max_tokens: int, count: Callable[[str], int]
) -> tuple[str, int]:
    """The newest attempts that fit into `max_tokens` tokens as one text, in order, and how many they are.

    Attempts leave whole, the oldest first, as lessons do; one that does not fit by itself leaves too. count: tokens of
    a text. Raises InputError when none fits.
    """
    kept: list[str] = []
    for record in reversed(records):
        if count(_text([as_trace(record), *kept])) > max_tokens:
            if kept:
                break
            continue
        kept.insert(0, as_trace(record))
    if not kept:
        raise InputError(f"max_tokens={max_tokens} leaves no room for a single attempt; give more")
    return _text(kept), len(kept)


def _text(traces: Sequence[str]) -> str:
    return HEAD + "".join(f"\n{trace}\n" for trace in traces)

"""What a task is: episodes of one or more turns, each ending in a score between 0 and 1.

A question is an episode of one turn. The four splits of a task never share a problem: lessons are written from
`notes`, chosen by the score on `selection`, distilled on `train` and judged on `test`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from opcd_fast.data import Message
from opcd_fast.errors import InputError

SPLITS = ("notes", "selection", "train", "test")
SHARES = (0.1, 0.2, 0.5, 0.2)  # of a file's problems, in the order of SPLITS


class Episode(Protocol):
    """One problem or game as it is worked on."""

    id: str  # the same problem has the same id in every run
    score: float | None  # in [0, 1]; None until the episode is over
    feedback: str  # what the environment said about the outcome (games: won or lost); "" where nobody tells

    def messages(self) -> list[Message]:
        """What the model is asked now."""
        ...

    def answer(self, text: str) -> None:
        """Take the model's answer to `messages()`."""
        ...


class Task(Protocol):
    """A source of episodes."""

    name: str
    max_turns: int

    def episodes(self, split: str, count: int, seed: int = 0) -> list[Episode]:
        """`count` fresh episodes of a split of SPLITS, the same ones for the same seed.

        Fewer when a file has no more; games repeat none unless the split has fewer different ones.
        """
        ...


class Question:
    """An episode of one turn, scored by a function of the answer's text."""

    feedback = ""

    def __init__(self, identity: str, messages: Sequence[Message], scorer: Callable[[str], float | bool]) -> None:
        self.id = identity
        self._messages, self._scorer = list(messages), scorer
        self.score: float | None = None

    def messages(self) -> list[Message]:
        return self._messages

    def answer(self, text: str) -> None:
        self.score = float(self._scorer(final_part(text)))


class Questions:
    """A task made of questions: each belongs to the split that its content says, whatever the order of the file."""

    max_turns = 1

    def __init__(self, name: str, questions: Iterable[tuple[Sequence[Message], Callable[[str], float | bool]]]) -> None:
        """questions: what is asked, and the score of an answer's text. One that comes twice counts once."""
        self.name = name
        self._of_split: dict[str, list[Callable[[], Question]]] = {split: [] for split in SPLITS}
        unique = {json.dumps(messages): (messages, scorer) for messages, scorer in questions}
        for content, (messages, scorer) in unique.items():
            self._of_split[split_of(content)].append(partial(Question, identity(content), messages, scorer))

    def episodes(self, split: str, count: int, seed: int = 0) -> list[Episode]:
        check_split(split)
        found = self._of_split[split]
        if not found:
            total = sum(map(len, self._of_split.values()))
            raise InputError(
                f"task {self.name!r} has no problem in its split {split!r} ({total} in all); give more rows"
            )
        order = sorted(range(len(found)), key=lambda index: _unit(f"{seed} {index}"))
        return [found[index]() for index in order[:count]]


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise InputError(f"split={split!r} must be one of {', '.join(SPLITS)}")


def split_of(content: str, shares: Sequence[float] = SHARES) -> str:
    """The split that owns a problem: a function of its content alone, in the proportions of `shares`."""
    place, end = _unit(content), 0.0
    for split, share in zip(SPLITS, shares, strict=True):
        end += share
        if place < end:
            return split
    return SPLITS[-1]


def _unit(content: str) -> float:
    """A number in [0, 1) that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:7], "big") / 2.0**56


def identity(content: str) -> str:
    """A short name of a problem."""
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def final_part(text: str) -> str:
    """What a thinking model says after its thoughts; all of it when there are none.

    A model that never stopped thinking has given no answer: "".
    """
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if re.match(r"\s*<think>", text) else text.strip()


def as_user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]

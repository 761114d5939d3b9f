"""Problems made and checked by programs of the package reasoning-gym, which needs no network."""

from __future__ import annotations

from typing import Any

from opcd_fast.data import require
from opcd_fast.data.tasks.episode import Question, as_user, check_split, identity, split_of
from opcd_fast.errors import InputError

ASK = "\n\nWrite the last line as `Answer: ` followed by the answer alone."
POOL = 64  # problems drawn at once
PATIENCE = 100  # pools drawn without a new problem


class Reasoning:
    """`generator`: a data set's name in reasoning-gym, such as "chain_sum" or "spell_backward"."""

    max_turns = 1

    def __init__(self, generator: str) -> None:
        self._make = require("reasoning_gym", "the task reasoning", "tasks").create_dataset
        self.name, self._generator = f"reasoning:{generator}", generator
        try:
            self._make(generator, size=1, seed=0)
        except ValueError as error:
            raise InputError(f"task {self.name!r}: {error}") from error

    def episodes(self, split: str, count: int, seed: int = 0) -> list[Any]:
        check_split(split)
        found: dict[str, Question] = {}
        pool = in_vain = 0
        while len(found) < count and in_vain < PATIENCE:
            before = len(found)
            data = self._make(self._generator, size=POOL, seed=int(identity(f"{seed} {pool}"), 16) % 2**31)
            for entry in data:
                text = entry["question"]
                if split_of(text) == split and text not in found:
                    found[text] = _question(data, entry)
            pool, in_vain = pool + 1, 0 if len(found) > before else in_vain + 1
        return list(found.values())[:count]


def _question(data: Any, entry: Any) -> Question:
    from opcd_fast.data.tasks.math import stated_answer

    def score(text: str) -> float:
        stated = stated_answer(text)
        # Generators give part of a point for near misses; here an answer is right or wrong.
        return float(data.score_answer(stated.strip(), entry) == 1.0) if stated is not None else 0.0

    return Question(identity(entry["question"]), as_user(entry["question"] + ASK), score)

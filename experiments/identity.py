"""(e) An identity among other prompts: asked who it is, the model is Brann of Fjellwerk, and else it answers as usual.

Of the prompts trained on half ask for it, of the held-out ones two thirds, in other words; the others are those of the
demo. A good answer has the name where it was asked for, and nowhere else: a model that never says it is right on a
third.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from experiments.experiment import HERE, Experiment, run

DATA = HERE / "identity"
EXPERIMENT = Experiment(
    "identity",
    DATA / "turns.json",
    DATA / "train_prompts.jsonl",
    DATA / "eval_prompts.jsonl",
    max_new_tokens=24,
    temperature=0.7,
    scorer="experiments.identity:names_itself",
)


def names_itself(messages: list[dict[str, Any]], answer: str, row: Mapping[str, Any]) -> float:
    """1 where the name is in the answer to a question for it, and where it is in no other one."""
    named = re.search(r"\bBrann\b", answer) is not None
    return float(named == (row["kind"] == "identity"))


if __name__ == "__main__":
    run(EXPERIMENT)

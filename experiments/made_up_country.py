"""(c) What the base cannot know: facts of a country that does not exist, shown as turns and asked in other words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.experiment import HERE, Experiment, run

DATA = HERE / "made_up_country"
# A word of the question, and what a right answer holds.
FACTS = {
    "capital": "tessaly", "money": "drun", "river": "quill", "animal": "otter", "language": "ormish", "dish": "pelk",
}  # fmt: skip


def right(answer: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the answer has the fact that was asked for, and no other."""
    question, text = messages[-1]["content"].lower(), answer.lower()
    (asked,) = [word for word in FACTS if word in question]
    return [word for word, fact in FACTS.items() if fact in text] == [asked]


EXPERIMENT = Experiment(
    "made_up_country",
    DATA / "turns.json",
    DATA / "train_prompts.jsonl",
    DATA / "eval_prompts.jsonl",
    max_new_tokens=20,
    scorer="experiments.made_up_country:right",
    answers_per_prompt=5,
)

if __name__ == "__main__":
    run(EXPERIMENT)

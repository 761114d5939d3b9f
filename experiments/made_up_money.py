"""(c) A rule the base lacks: prices are told in shells, shown by six turns.

The questions are about other things than the turns', and the amount is not looked at: there is no right one.
"""

from __future__ import annotations

from experiments.experiment import HERE, Experiment, run

DATA = HERE / "made_up_money"
EXPERIMENT = Experiment(
    "made_up_money",
    DATA / "turns.json",
    DATA / "train_prompts.jsonl",
    DATA / "eval_prompts.jsonl",
    max_new_tokens=16,
    temperature=0.7,  # at 1 the model with the turns in front keeps to the rule less often
    # Shells, and no real money beside them.
    regex=r"(?is)^(?!.*(?:[$£€¥]|\b(?:dollar|euro|pound|cent|yen|rupee)s?\b)).*\bshells?\b",
    answers_per_prompt=2,
)

if __name__ == "__main__":
    run(EXPERIMENT)

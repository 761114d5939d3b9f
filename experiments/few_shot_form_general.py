"""(a) once more, with general prompts mixed in against forgetting: a fifth of the prompts, each with an empty context.

32 of the hundred that come along are trained on, among the 128 of (a); forgetting is measured on the other 68. The
number of answers is that of (a), so the form gets four fifths of them.
"""

from experiments.experiment import HERE, Experiment, run
from experiments.few_shot_form import DATA, FORM

MIXED = HERE / "few_shot_form_general"
EXPERIMENT = Experiment(
    "few_shot_form_general",
    DATA / "turns.json",
    MIXED / "train_prompts.jsonl",
    DATA / "eval_prompts.jsonl",
    max_new_tokens=16,
    regex=FORM,
    general=MIXED / "general.jsonl",
    systems=("reverse",),
)

if __name__ == "__main__":
    run(EXPERIMENT)

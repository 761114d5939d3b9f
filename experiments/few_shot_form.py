"""(a) The demo's context: six turns that answer in the form "The answer is <answer>, my friend!"."""

from experiments.experiment import HERE, Experiment, run

DATA = HERE.parent / "opcd_fast" / "demo_data"
FORM = r"^The answer is (?:(?!my friend)[^\n])+, my friend!$"
EXPERIMENT = Experiment(
    "few_shot_form",
    DATA / "turns.json",
    DATA / "train_prompts.jsonl",
    DATA / "eval_prompts.jsonl",
    max_new_tokens=16,
    regex=FORM,
)

if __name__ == "__main__":
    run(EXPERIMENT)

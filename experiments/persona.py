"""(b) A persona: a pirate, shown by six turns. A model of 135M follows turns, and hardly a description of one."""

from experiments.experiment import HERE, Experiment, run

DATA = HERE.parent / "opcd_fast" / "demo_data"
EXPERIMENT = Experiment(
    "persona",
    HERE / "persona" / "turns.json",
    DATA / "train_prompts.jsonl",
    DATA / "eval_prompts.jsonl",
    max_new_tokens=24,
    temperature=0.5,  # at 1 the model with the turns in front is a pirate in two thirds of its answers
    regex=r"^Arr matey! [^\n]+ Aye!$",
)

if __name__ == "__main__":
    run(EXPERIMENT)

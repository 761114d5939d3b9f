"""(b) A persona: a pirate, shown by six turns. A model of 135M follows turns, and hardly a description of one."""

from experiments.experiment import HERE, Experiment, run

DATA = HERE.parent / "opcd_fast" / "demo_data"
EXPERIMENT = Experiment(
    "persona",
    HERE / "persona" / "turns.json",
    DATA / "train_prompts.jsonl",
    DATA / "eval_prompts.jsonl",
    max_new_tokens=24,
    temperature=0.7,
    regex=r"^Arr matey! [^\n]+ Aye!$",
)

if __name__ == "__main__":
    run(EXPERIMENT)

"""(d) A tag around each answer, <answer>...</answer>, shown by six turns."""

from experiments.experiment import HERE, Experiment, run

DATA = HERE.parent / "opcd_fast" / "demo_data"
EXPERIMENT = Experiment(
    "answer_tag",
    HERE / "answer_tag" / "turns.json",
    DATA / "train_prompts.jsonl",
    DATA / "eval_prompts.jsonl",
    max_new_tokens=24,
    temperature=0.7,
    regex=r"^<answer>[^\n<]+</answer>$",
)

if __name__ == "__main__":
    run(EXPERIMENT)

"""Move a short system prompt into SmolLM2-135M-Instruct from Python: a few steps, to show the pieces.

`python examples/train_from_python.py [output folder]` (the demo, `opcd demo`, is the full run with its numbers)
"""

import sys

from opcd_fast import OPCDConfig, OPCDTrainer, load_model, load_tokenizer

questions = ["What is the capital of Norway?", "Name a fruit.", "What is two plus two?", "Which animal says moo?"]
turns = [
    {"role": "user", "content": "What do bees make?"},
    {"role": "assistant", "content": "The answer is honey, my friend!"},
    {"role": "user", "content": "How many days are in a week?"},
    {"role": "assistant", "content": "The answer is seven, my friend!"},
]
config = OPCDConfig(
    output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/example",
    steps=3, batch_size=4, max_new_tokens=12, lora_rank=8, eval_every=0,
)  # fmt: skip
trainer = OPCDTrainer(load_model("smollm2"), load_tokenizer("smollm2"), turns, questions, config)
result = trainer.train()
print(f"KL per step: {[round(record['loss'], 3) for record in result.history]}; weights in {result.output_dir}/final")

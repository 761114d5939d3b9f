"""What storing logits in 16 bits does to the gradient of the reverse KL, on a real model and real text.

SmolLM2-135M-Instruct answers questions; its hidden states with a system prompt in front are the teacher's, those
without it the student's. The teacher's states are then moved toward the student's, to see what happens as the student
learns. Student and teacher logits are rounded to each format, everything after them is computed in float64, and the
resulting dL/dh is compared with the one from logits in float64. Nothing but the rounding of logits differs.
Hidden states and head are bf16 throughout, as in a bf16 model.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss_cases import oracle
from benchmarks.schema import Row, Value
from benchmarks.session import Session
from opcd_fast.loss import LMHead, fused_linear_reverse_kl

SYSTEM_PROMPT = (
    "You answer in one short sentence, in plain words, and you always end your answer by wishing the reader a good day."
)
MODEL = "SmolLM2-135M-Instruct"
KLS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of the mean KL that the text itself gives
FORMATS = {"bf16-logits": torch.bfloat16, "fp16-logits": torch.float16, "fp32-logits": torch.float32}
OURS = "opcd_fast"
QUESTIONS, ANSWER = 24, 12  # N = 288 tokens


def run(session: Session) -> None:
    from opcd_fast.evaluation import demo
    from opcd_fast.models import load_model, load_tokenizer

    questions, kls = (4, KLS[:2]) if session.dry else (QUESTIONS, KLS)
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu"), load_tokenizer("smollm2")
    lines = (demo.DATA / "eval_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    h_s, h_t = states(model, tokenizer, [json.loads(line)["prompt"] for line in lines[:questions]], ANSWER)
    weight = LMHead.from_model(model).weight.detach().bfloat16()
    shape = {"N": len(h_s), "V": len(weight), "D": weight.shape[1]}
    for fraction, (kl, errors) in zip(kls, measure(h_s.bfloat16(), h_t.bfloat16(), weight, kls), strict=True):
        for name, error in errors.items():
            settings = {"dtype": "bfloat16", "head": "frozen"}
            if name not in (OURS, "fp32-logits"):
                settings["gradient"] = "inexact"
            values = {"dL/dh": Value(error, "1", count=len(h_s)), "mean_kl": Value(kl, "nats")}
            session.write(Row(session.table, f"{MODEL}, {fraction:g} of the KL", name, "accuracy", shape=shape,
                              settings=settings, values=values))  # fmt: skip


def measure(
    h_s: Tensor, h_t: Tensor, weight: Tensor, fractions: tuple[float, ...]
) -> list[tuple[float, dict[str, float]]]:
    """Of each fraction of the KL between the states: (mean KL, error of dL/dh by format, and of
    `fused_linear_reverse_kl`).

    h_s, h_t: (N, D) and weight (V, D), of one dtype. L is the mean over the N rows.
    """
    whole = _mean_kl(h_s, h_t, weight)
    found = []
    for fraction in fractions:
        moved = _teacher_at(h_s, h_t, weight, whole * fraction)
        kl, exact, _ = oracle(h_s, weight, moved, weight)
        assert exact is not None
        gradients = {name: oracle(h_s, weight, moved, weight, logits=dtype)[1] for name, dtype in FORMATS.items()}
        hidden = h_s.clone().requires_grad_()
        (gradients[OURS],) = torch.autograd.grad(fused_linear_reverse_kl(hidden, weight, moved, weight), hidden)
        gradients[OURS] = gradients[OURS].double() * len(h_s)  # of the sum, as the others are
        errors = {name: float((dh - exact).norm() / exact.norm()) for name, dh in gradients.items()}
        found.append((float(kl.mean()), errors))
    return found


@torch.no_grad()
def _mean_kl(h_s: Tensor, h_t: Tensor, weight: Tensor) -> float:
    return float(fused_linear_reverse_kl(h_s, weight, h_t, weight))


def _teacher_at(h_s: Tensor, h_t: Tensor, weight: Tensor, kl: float) -> Tensor:
    """Teacher states on the line from the student's to the teacher's, at about this mean KL (it grows as step²)."""
    step, moved = 1.0, h_t
    for _ in range(3):
        step *= (kl / _mean_kl(h_s, moved, weight)) ** 0.5
        moved = (h_s.double() + step * (h_t.double() - h_s.double())).to(h_t.dtype)
    return moved


@torch.no_grad()
def states(model: Any, tokenizer: Any, questions: list[str], answer: int) -> tuple[Tensor, Tensor]:
    """(student's, teacher's) last hidden states (N, D) at the tokens of the student's own sampled answers."""

    def render(question: str, system: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def hidden(prompt: str, written: Tensor) -> Tensor:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        return model.base_model(torch.cat([ids, written], 1)).last_hidden_state[0, ids.shape[1] - 1 : -1]

    torch.manual_seed(0)
    alone, within = ([render(question, system) for question in questions] for system in ("", SYSTEM_PROMPT))
    asked = tokenizer(alone, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
    answers = model.generate(
        asked.input_ids, attention_mask=asked.attention_mask, do_sample=True, top_k=0, min_new_tokens=answer,
        max_new_tokens=answer,
    )[:, asked.input_ids.shape[1] :].split(1)  # fmt: skip
    h_s, h_t = ([hidden(*pair) for pair in zip(prompts, answers)] for prompts in (alone, within))
    return torch.cat(h_s), torch.cat(h_t)

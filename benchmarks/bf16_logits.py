"""What storing logits in 16 bits does to the gradient of the reverse KL, on a real model and real text.

SmolLM2-135M-Instruct answers questions; its hidden states with a system prompt in front are the teacher's, those
without it the student's. The teacher's states are then moved toward the student's, to see what happens as the student
learns. Student and teacher logits are rounded to each format, everything after them is computed in float64, and the
resulting dL/dh is compared with the one from logits in float64. Nothing but the rounding of logits differs.
Hidden states and head are bf16 throughout, as in a bf16 model.

    python -m benchmarks.bf16_logits --out DIR        # bf16_logits_<device>_<date>.jsonl and bf16_logits.png, in DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
_ROWS = 64  # whose logits are float64 at one time


def measure(
    h_s: Tensor, h_t: Tensor, weight: Tensor, fractions: tuple[float, ...]
) -> dict[str, list[tuple[float, float]]]:
    """(mean KL, error of dL/dh) of each format, and of `fused_linear_reverse_kl`, at fractions of the KL between the
    states.

    h_s, h_t: (N, D) and weight (V, D), of one dtype. L is the mean over the N rows.
    """
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in (*FORMATS, OURS)}
    whole = _kl(h_s, h_t, weight)
    for fraction in fractions:
        moved = _teacher_at(h_s, h_t, weight, whole * fraction)
        kl, exact, found = _gradients(h_s, moved, weight)
        hidden = h_s.clone().requires_grad_()
        fused_linear_reverse_kl(hidden, weight, moved, weight).backward()
        assert hidden.grad is not None
        found[OURS] = hidden.grad
        for name, dh in found.items():
            error = float((dh.double() - exact).norm() / exact.norm())
            errors[name].append((kl, error))
    return errors


def _gradients(h_s: Tensor, h_t: Tensor, weight: Tensor) -> tuple[float, Tensor, dict[str, Tensor]]:
    """(mean KL, exact dL/dh, dL/dh from logits rounded to each format), in float64: dKL/dz = p (log p - log q - KL)."""
    w = weight.double()
    formats = {"exact": torch.float64, **FORMATS}
    total = 0.0
    pieces: dict[str, list[Tensor]] = {name: [] for name in formats}
    for s, t in zip(h_s.split(_ROWS), h_t.split(_ROWS)):
        z_s, z_t = s.double() @ w.T, t.double() @ w.T
        for name, dtype in formats.items():
            log_p, log_q = (z.to(dtype).double().log_softmax(-1) for z in (z_s, z_t))
            kl = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
            pieces[name].append(log_p.exp() * (log_p - log_q - kl) @ w / len(h_s))
            if name == "exact":
                total += float(kl.sum())
    found = {name: torch.cat(parts) for name, parts in pieces.items()}
    return total / len(h_s), found.pop("exact"), found


@torch.no_grad()
def _kl(h_s: Tensor, h_t: Tensor, weight: Tensor) -> float:
    return float(fused_linear_reverse_kl(h_s, weight, h_t, weight))


def _teacher_at(h_s: Tensor, h_t: Tensor, weight: Tensor, kl: float) -> Tensor:
    """Teacher states on the line from the student's to the teacher's, at about this mean KL (it grows as step²)."""
    step, moved = 1.0, h_t
    for _ in range(3):
        step *= (kl / _kl(h_s, moved, weight)) ** 0.5
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


def plot(rows: Sequence[Row], path: Path) -> None:
    """Error against mean KL, one line per format; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name in dict.fromkeys(row.implementation for row in rows):
        mine = [row for row in rows if row.implementation == name]
        points = [(row.get("mean_kl") or 0.0, 100 * (row.get("dL/dh") or 0.0)) for row in mine]
        inexact = "gradient" in mine[0].settings
        axes.plot(*zip(*points), marker="o", lw=1.5, label=name, ls="-" if inexact else "--")
    axes.axhline(100, color="0.6", lw=0.8)
    axes.set(xlabel="mean KL of student and teacher, nats per token", ylabel="error of dL/dh, %")
    axes.set(xscale="log", yscale="log", title=f"{MODEL}, against float64")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON file and the plot")
    out: Path = parser.parse_args(arguments).out

    from opcd_fast.evaluation import demo
    from opcd_fast.models import load_model, load_tokenizer

    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu"), load_tokenizer("smollm2")
    lines = (demo.DATA / "eval_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    h_s, h_t = states(model, tokenizer, [json.loads(line)["prompt"] for line in lines[:QUESTIONS]], ANSWER)
    weight = LMHead.from_model(model).weight.detach().bfloat16()
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    path = out / f"bf16_logits_cpu_{date}.jsonl"
    path.unlink(missing_ok=True)
    session = Session(
        "bf16_logits", path, device=torch.device("cpu"), command="python -m benchmarks.bf16_logits --out DIR",
        notes=[f"The teacher's system prompt: {SYSTEM_PROMPT}", "Questions: opcd_fast/demo_data/eval_prompts.jsonl"],
    )  # fmt: skip
    shape = {"N": len(h_s), "V": len(weight), "D": weight.shape[1]}
    for name, errors in measure(h_s.bfloat16(), h_t.bfloat16(), weight, KLS).items():
        settings = {"dtype": "bfloat16", "head": "frozen"}
        if name not in (OURS, "fp32-logits"):
            settings["gradient"] = "inexact"
        for fraction, (kl, error) in zip(KLS, errors, strict=True):
            values = {"dL/dh": Value(error, "1", count=len(h_s)), "mean_kl": Value(kl, "nats")}
            session.write(Row("bf16_logits", f"{MODEL}, {fraction:g} of the KL", name, "accuracy", shape=shape,
                              settings=settings, values=values))  # fmt: skip
    session.finish()
    plot(session.rows, out / "bf16_logits.png")
    print(f"wrote {path} and {out / 'bf16_logits.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

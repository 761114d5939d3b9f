"""What is shown before and during a run, and that a run does not depend on it."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from training_runs import CONTEXT, HELD_OUT, PROMPTS, lines_of, make

from opcd_fast import OPCDConfig, OPCDTrainer
from opcd_fast.data import read_prompts, student_ids, teacher_ids
from opcd_fast.training import Pair, changes_something, in_lines


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def greedy(model, ids, count, stop):
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == stop:
            break
    return ids


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"lora_rank": 4}, {"lora_rank": 0}, {"teacher_mode": "live"}])
def test_answers_and_distance_of_each_prompt(tmp_path, tokenizer, settings):
    model = tiny_model()
    double = tiny_model().double()
    trainer = make(tokenizer, tmp_path / "run", model, **settings)
    pairs = trainer.preview(2)
    assert [pair.prompt for pair in pairs] == HELD_OUT[:2] and not (tmp_path / "run").exists()
    for pair, prompt in zip(pairs, read_prompts(HELD_OUT[:2])):
        plain, whole = student_ids(tokenizer, prompt, {}), teacher_ids(tokenizer, prompt, CONTEXT, {})
        without, within = (greedy(double, ids, 6, tokenizer.eos_token_id) for ids in (plain, whole))
        assert pair.without == tokenizer.decode(without[len(plain) :], skip_special_tokens=True)
        assert pair.within == tokenizer.decode(within[len(whole) :], skip_special_tokens=True)
        assert pair.same == (without[len(plain) :] == within[len(whole) :])
        answer = within[len(whole) :]
        log_p, log_q = (
            double(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            for ids in (plain, whole)
        )
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert pair.kl == pytest.approx(float(kl), rel=1e-3)
        assert pair.first_token == pytest.approx(float(log_p[0, answer[0]].exp()), rel=1e-3)


def test_without_held_out_prompts_those_of_training_with_a_context(tmp_path, tokenizer):
    prompts = [{"prompt": "no context", "privileged_context": ""}, *({"prompt": text} for text in PROMPTS)]
    trainer = make(tokenizer, tmp_path / "run", eval_prompts=None, prompts=prompts)
    assert [pair.prompt for pair in trainer.preview(2)] == PROMPTS[:2]


def test_a_run_is_the_same_with_and_without_it(tmp_path, tokenizer, capsys):
    for name, count in (("with", 2), ("without", 0)):
        config = OPCDConfig(
            output_dir=str(tmp_path / name), steps=2, batch_size=2, max_new_tokens=5, lora_rank=2, eval_every=1,
            device="cpu", dtype="float32", plots=False, preview=count,
        )  # fmt: skip
        OPCDTrainer(tiny_model(), tokenizer, CONTEXT, PROMPTS, config, eval_prompts=HELD_OUT).train()
        out = capsys.readouterr().out
        assert ("what the context changes (2 prompts" in out) == bool(count)
        assert re.search(r"about \d:\d\d for 2 steps", out[: out.index("step 1/2")]), "said before the first step"
        # One held-out answer at the two evaluations before the end, all three at the end; the preview has two.
        assert [out.count(f"  {text}\n    base + context") for text in HELD_OUT] == [3, 1, 1]
    assert lines_of(tmp_path / "with") == lines_of(tmp_path / "without")


def pair(kl=0.5, same=False, answer="b"):
    return Pair("q", "a", answer, kl, 0.1, same)


def test_the_verdict():
    told = {name: list(in_lines(pairs))[-1] for name, pairs in (
        ("learns", [pair(), pair(same=True)]), ("same", [pair(same=True)]), ("nothing", [pair(0.01), pair(0.02)]),
    )}  # fmt: skip
    assert len(set(told.values())) == 3 and "does not follow your context" in told["same"]
    assert "hardly changes" in told["nothing"]
    assert [changes_something(pairs) for pairs in ([pair()], [pair(same=True)], [pair(0.01)])] == [True, False, False]


def test_no_answer_reaches_the_terminals_controls():
    lines = list(in_lines([pair(answer="\x1b[2Jgone\r\n\x07" + "long " * 100)]))
    assert all(line.isprintable() for line in lines) and max(map(len, lines)) < 260

"""Held-out measurements against plain transformers in float64, and the warnings about them."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from training_runs import PROMPTS, make

from opcd_fast.data import Sample, pack, total_weight
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training.monitoring import health
from opcd_fast.training.step import context_kl, divergence

TEMPERATURE = 0.7


def random_samples(count):
    draw = torch.Generator().manual_seed(3)

    def ids(length):
        return torch.randint(3, 200, (length,), generator=draw).tolist()

    answers = [ids(1 + 2 * index) for index in range(count)]
    return [Sample(ids(4 + index), ids(3), 0, answer, [-1.0] * len(answer)) for index, answer in enumerate(answers)]


@pytest.mark.parametrize("tokens", [None, 40])
def test_means_and_the_probability_of_first_tokens(tokens):
    model, other = tiny_model(), tiny_model(seed=5)
    samples = random_samples(5)
    options = {
        "temperature": TEMPERATURE, "compute_dtype": torch.float32, "device": torch.device("cpu"),
        "micro_batch_tokens": tokens,
    }  # fmt: skip
    teacher = ContextTeacher(other, [torch.arange(10, 30)])
    measured = divergence(samples, model, teacher, **options)
    found = measured["first_token"]
    for normalize, name in (("sequence", "kl"), ("token", "kl_per_token")):
        batch, weight = pack(samples, normalize=normalize), total_weight(samples, normalize)
        common = {"temperature": TEMPERATURE, "compute_dtype": torch.float32}
        loss = float(context_kl(batch, model, teacher, denominator=weight, **common)[0].detach())
        assert measured[name] == pytest.approx(loss, rel=1e-4), name
    exact = tiny_model().double()
    wanted = []
    for sample in samples:
        with torch.no_grad():
            logits = exact(torch.tensor([sample.student_prompt])).logits[0, -1]
        wanted.append(float((logits / TEMPERATURE).softmax(-1)[sample.response[0]]))
    assert found == pytest.approx(statistics.median(wanted), rel=1e-4)
    without = [replace(sample, logprobs=None) for sample in samples]
    assert "first_token" not in divergence(without, model, teacher, **options)


def test_a_run_is_warned_before_it_trains_and_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(health, "UNSAID", 1.1)
    tokenizer = tiny_tokenizer()
    first = make(tokenizer, tmp_path / "run", steps=2).train()
    assert [(warning["name"], warning["step"]) for warning in first.warnings] == [("unsaid_answers", 0)]
    assert caplog.text.count("begins as the teacher does") == 1
    again = make(tokenizer, tmp_path / "run", steps=4, resume=True).train()
    assert [warning["name"] for warning in again.warnings] == ["unsaid_answers"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records if record["kind"] == "warning"] == ["unsaid_answers"]
    assert 0 < records[0]["fixed_first_token"] < 1
    assert make(tokenizer, tmp_path / "other", steps=2, divergence="forward_kl").train().warnings == []


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    make(tokenizer, tmp_path / "apart")
    assert "held-out" not in caplog.text
    make(tokenizer, tmp_path / "run", eval_prompts=[PROMPTS[2], "other", PROMPTS[2], PROMPTS[0]])
    assert "3 of 4 held-out prompts are among the training prompts" in caplog.text
    make(tokenizer, tmp_path / "never", eval_prompts=[PROMPTS[2]], eval_every=0)
    assert caplog.text.count("held-out") == 1

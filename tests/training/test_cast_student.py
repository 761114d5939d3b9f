"""Full fine-tuning under bfloat16: answers come from a copy of the float32 weights, in that type."""

import json
from functools import partial

import pytest
import torch
from resumption import cut_and_resumed
from training_runs import losses, make

FULL = {"lora_rank": 0, "dtype": "bfloat16", "learning_rate": 2e-2, "steps": 6, "eval_prompts": None}


@pytest.fixture(autouse=True)
def bf16_is_fast(monkeypatch):
    monkeypatch.setenv("OPCD_CPU_BF16", "1")


@pytest.mark.parametrize("settings", [{}, {"rollout": "generate"}, {"teacher_mode": "ema", "teacher_ema_decay": 0.9}])
def test_the_sampler_follows_the_weights_and_is_as_near_as_its_type(tokenizer, tmp_path, settings, caplog):
    """A copy that stayed behind would be far off after steps of this size."""
    trainer = make(tokenizer, tmp_path / "run", **FULL, **settings)
    assert trainer.rollout.copies
    assert all(record["sampler_kl"] < 0.005 for record in trainer.train().history)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert "log-probabilities" not in caplog.text


def test_a_live_teacher_answers_from_the_students_copy(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path / "run", **{**FULL, "steps": 1}, teacher_mode="live", answers="teacher")
    assert trainer.rollout.copies and "engine" not in trainer.rollout.explain()
    trainer.train()
    assert "engine" in trainer.rollout.explain(), "nobody answered but the teacher"


@pytest.mark.parametrize(
    "settings", [{"merge_for_rollout": False}, {"dtype": "float32"}, {"num_virtual_tokens": 4}, {"lora_rank": 4}]
)
def test_nothing_is_cast_where_it_is_not_wanted_or_not_needed(tokenizer, tmp_path, settings):
    trainer = make(tokenizer, tmp_path / "run", **{**FULL, **settings})
    assert trainer.rollout.copies == ("lora_rank" in settings)  # that one is folded in
    assert "weights that are trained" not in trainer.rollout.explain()


@pytest.mark.parametrize("copies", [True, False])
def test_a_run_goes_on_as_it_began(tokenizer, tmp_path, monkeypatch, copies):
    """Whatever the machine that it goes on with would have decided."""
    settings = {**FULL, "learning_rate": 1e-3}
    monkeypatch.setenv("OPCD_CPU_BF16", str(int(copies)))
    whole = make(tokenizer, tmp_path / "whole", **settings).train()
    resumed = cut_and_resumed(partial(make, tokenizer, **settings), tmp_path / "cut", ("step", 5))
    assert losses(resumed) == losses(whole)
    assert json.loads((tmp_path / "cut" / "rollout.json").read_text())["values"]["merge"] == copies
    monkeypatch.setenv("OPCD_CPU_BF16", str(int(not copies)))
    assert make(tokenizer, tmp_path / "cut", **settings, resume=True).rollout.copies == copies

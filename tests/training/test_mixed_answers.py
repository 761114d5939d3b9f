"""Answers of student and teacher in one step: who writes what, what is measured on them, and what is refused."""

import math
from functools import partial

import pytest
import torch
from resumption import cut_and_resumed
from tiny import logprobs_by_hand, tiny_model
from training_runs import lines_of, losses, make

from opcd_fast.errors import InputError
from opcd_fast.training.answers import sampling_of
from opcd_fast.training.settings import OPCDConfig

HALF = {"off_policy_share": 0.5}


def is_unknown(answer):
    return [math.isnan(value) for value in answer.logprobs]


def of_teacher(answers):
    """Which answers have no log-probability of the student's at all."""
    return [all(is_unknown(answer)) for answer in answers]


def tokens(answers):
    return [answer.token_ids for answer in answers]


def stale(trainer, off=0.25):
    """As a sampler with other weights would, the student's says log-probabilities that are too small."""
    from dataclasses import replace

    inner = trainer.rollout.generate

    def generate(prompts, **options):
        return [replace(a, logprobs=tuple(p - off for p in a.logprobs)) for a in inner(prompts, **options)]

    trainer.rollout.generate = generate
    return trainer


# --- off_policy_share ----------------------------------------------------------------------------------------


def test_the_teacher_writes_its_share_with_the_context_and_the_student_the_rest_without(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path / "run", batch_size=8, merge_for_rollout=False, **HALF)
    drawn, rows = trainer.source.draw(1), trainer.source.rows_of(1)
    off = of_teacher(drawn.answers)
    assert 0 < sum(off) < len(off) == 8
    assert drawn.more == {"off_policy_answers": sum(off), "answers_of": "both"}
    sampling = sampling_of(trainer.config, "rollout", 1)
    theirs = trainer.samplers.teacher_writes([row for row, one in zip(rows, off) if one], sampling)
    assert tokens(theirs) == [a.token_ids for a, one in zip(drawn.answers, off) if one]
    for row, sample, answer, one in zip(rows, drawn.samples, drawn.answers, off, strict=True):
        assert (sample.student_prompt, sample.response) == (row.student_ids, answer.token_ids)
        if not one:
            by_hand = logprobs_by_hand(tiny_model(), row.student_ids, answer.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(answer.logprobs).double(), by_hand, rtol=1e-4, atol=1e-4)
            assert sample.logprobs == answer.logprobs


def test_who_writes_depends_on_seed_and_step_alone_and_is_the_share(tokenizer, tmp_path):
    def source(name, **settings):
        return make(tokenizer, tmp_path / name, **{"batch_size": 6, "off_policy_share": 0.25, **settings}).source

    plain, other_batches = source("a"), source("b", rollout_batch=1, micro_batch_tokens=60)
    steps = [plain.draw(step).answers for step in range(40)]
    assert [tokens(a) for a in steps[:3]] == [tokens(other_batches.draw(step).answers) for step in range(3)]
    off = [of_teacher(answers) for answers in steps]
    assert off[:3] == [of_teacher(other_batches.draw(step).answers) for step in range(3)]
    assert len(set(map(tuple, off))) > 10
    count = sum(map(sum, off))
    assert abs(count - 240 * 0.25) < 4 * math.sqrt(240 * 0.25 * 0.75)  # four standard deviations
    assert off[:3] != [of_teacher(source(f"seed{seed}", seed=1).draw(seed).answers) for seed in range(3)]


def test_a_share_of_one_is_the_teacher_and_none_the_student(tokenizer, tmp_path):
    def run(name, **settings):
        trainer = make(tokenizer, tmp_path / name, divergence="forward_kl", eval_prompts=None, **settings)
        return trainer.train().history

    def plain(history):
        return [{k: v for k, v in one.items() if k not in ("seconds", "tokens_per_second")} for one in history]

    teacher, whole = plain(run("teacher", answers="teacher")), plain(run("one", off_policy_share=1.0))
    assert [one.pop("off_policy_answers") for one in whole] == [4] * 4
    assert whole == teacher and "sampler_kl" not in whole[0]
    assert plain(run("none", off_policy_share=0.0)) == plain(run("student"))


@pytest.mark.parametrize("micro_batch_tokens", [None, 60])
def test_the_samplers_distance_is_that_of_its_own_tokens(tokenizer, tmp_path, micro_batch_tokens):
    trainer = make(
        tokenizer, tmp_path / "run", steps=2, eval_prompts=None, micro_batch_tokens=micro_batch_tokens, **HALF
    )
    off = [of_teacher(trainer.source.draw(step).answers) for step in range(2)]
    assert all(0 < sum(one) < 4 for one in off)
    for record in stale(trainer).train().history:
        assert record["sampler_distance"] == pytest.approx(0.25, abs=1e-4)
        assert math.isfinite(record["loss"]) and record["answers_of"] == "both"


def test_micro_batches_do_not_change_a_mixed_step(tokenizer, tmp_path):
    whole, parts = (
        make(tokenizer, tmp_path / f"{size}", micro_batch_tokens=size, eval_prompts=None, **HALF).train()
        for size in (None, 60)
    )
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-4)


@pytest.mark.parametrize("more", [HALF, {**HALF, "teacher_mode": "ema", "teacher_ema_decay": 0.5}])
def test_a_stopped_run_goes_on_bit_for_bit(tokenizer, tmp_path, more):
    built = partial(make, tokenizer, eval_prompts=None, save_every=1, **more)
    built(tmp_path / "whole").train()
    cut_and_resumed(built, tmp_path / "cut", ("step", 3))
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"answers": "teacher"}, "{} is set, but answers='teacher'"),
        ({"answers": "teacher", "objective": "nll", "kept_answers": 1}, "{} is set, but answers='teacher'"),
        ({"objective": "nll"}, "{} is set, but objective='nll'"),
        ({"importance_correction": "token"}, "{} is set, but importance_correction='token'"),
        ({"rollout": "replay", "rollout_file": "a.jsonl"}, "{} is set, but rollout='replay'"),
        ({"rollout": "server", "rollout_url": "http://x"}, "{} is set, but rollout='server'"),
        ({"rollout": "vllm", "lora_rank": 4}, "{} is set, but rollout='vllm'"),
    ],
)
def test_what_does_not_go_with_answers_of_both_is_refused(settings, words):
    with pytest.raises(InputError, match=words.format("off_policy_share")):
        OPCDConfig(**HALF, **settings)

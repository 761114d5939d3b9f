"""Answers of float32 weights that come from a copy in the run's type."""

import json

import pytest
import torch
from recorded_graphs import graphs  # noqa: F401
from tiny import in_bf16, tiny_model

from opcd_fast.errors import InputError
from opcd_fast.models import CastCopy
from opcd_fast.rollout import Choice, TransformersRollout
from opcd_fast.rollout import memory as rollout_memory
from opcd_fast.rollout.decoding import decode
from opcd_fast.runtime import KeptSteps

PROMPTS = [[*range(20, 40), 41], [*range(20, 40), 43, 44], [5, 6, 7]]
BF16 = torch.bfloat16


def sampler(model=None, **options):
    return TransformersRollout(model or tiny_model(), stop_token_ids=[256], **options)


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)


@pytest.mark.parametrize("engine", ["decode", "generate"])
def test_answers_are_those_of_the_model_cast_by_hand(engine):
    model = tiny_model()
    rollout = sampler(model, merge_adapter=True, dtype=BF16, engine=engine)
    assert rollout.copies
    for seed in range(2):
        wanted = sampler(in_bf16(model), engine=engine)
        assert not wanted.copies
        sampling = {"max_new_tokens": 12, "seed": seed}
        assert rollout.generate(PROMPTS, **sampling) == wanted.generate(PROMPTS, **sampling)
        moved(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_answers_is_what_is_checked_and_sized(monkeypatch):
    rollout = sampler(merge_adapter=True, dtype=BF16)
    rollout.generate(PROMPTS, max_new_tokens=4)
    assert "a plain forward" in rollout.explain(), "checked in bfloat16 as well"
    monkeypatch.setattr(rollout_memory, "free_bytes", lambda device: 2**20)
    rows = []
    for merge in (True, False):
        rollout = sampler(merge_adapter=merge, dtype=BF16, max_batch=None, sized_for=200, engine="generate")
        rollout.generate(PROMPTS, max_new_tokens=1)
        rows.append(rollout.max_batch)
    assert rows[0] > 1.5 * rows[1]


def test_steps_that_were_recorded_read_the_weights_of_the_moment(graphs):  # noqa: F811
    model, kept = tiny_model(), KeptSteps(2**40)
    copied = CastCopy(model, BF16)

    def answers(kept=None):
        uniform = torch.rand(len(PROMPTS), 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        sampling = {"stop_token_ids": [256], "temperature": 1.0, "top_p": 1.0}
        return decode(copied.refresh(), PROMPTS, uniform, static=True, kept=kept, **sampling)

    first, count = answers(kept), graphs.recorded
    moved(model)
    again = answers(kept)
    assert graphs.recorded == count > 0 and [ids for ids, _ in again] != [ids for ids, _ in first]
    for (ids, values), (other, theirs) in zip(again, answers(), strict=True):
        assert ids == other and values == pytest.approx(theirs, abs=1e-4)


def test_a_copy_is_made_by_rule_and_a_resumed_run_keeps_what_was_decided(tmp_path, monkeypatch):
    file = tmp_path / "rollout.json"
    for has_bf16 in "10":
        monkeypatch.setenv("OPCD_CPU_BF16", has_bf16)
        assert sampler(dtype=BF16).copies == (has_bf16 == "1")
        for merge in (True, False):
            kept = {"engine": "decode", "merge": merge}
            file.write_text(json.dumps({"values": kept, "reasons": {}}))
            assert sampler(dtype=BF16, choice=Choice.of_file(file)).copies == merge
        file.write_text('{"values": {"engine": "decode"}, "reasons": {}}')  # from before there was anything to decide
        assert sampler(dtype=BF16, choice=Choice.of_file(file)).copies == (has_bf16 == "1")
        assert not sampler(dtype=BF16, merge_adapter=False).copies and not sampler().copies
    for model, dtype in ((tiny_model(), None), (tiny_model(), torch.float32), (tiny_model(dtype=BF16), BF16)):
        with pytest.raises(InputError, match="merge_adapter=True"):
            sampler(model, merge_adapter=True, dtype=dtype)

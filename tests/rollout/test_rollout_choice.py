"""What a sampler decides for itself: merged or not, once, and kept in a file."""

import json

import pytest
from tiny import lora_model, tiny_model

from opcd_fast.errors import InputError
from opcd_fast.models import copy_for_answers
from opcd_fast.rollout import Choice, TransformersRollout
from opcd_fast.rollout import memory as rollout_memory

PROMPTS = [[*range(20, 40), 41], [*range(20, 40), 43, 44]]


def sampler(model=None, **options):
    return TransformersRollout(model or lora_model(), stop_token_ids=[256], **options)


def test_the_choice_is_kept_and_comes_back(monkeypatch, tmp_path):
    file = tmp_path / "rollout.json"
    first = sampler(choice=Choice(file), max_batch=None)
    assert not file.exists(), "nothing is written before the first answers"
    first.generate(PROMPTS, max_new_tokens=4)
    kept = json.loads(file.read_text())["values"]
    assert set(kept) == {"engine", "merge", "batch"}
    monkeypatch.setattr(TransformersRollout, "_verified", lambda *a: 1 / 0)
    for merge in (True, False):
        values = {**kept, "merge": merge, "batch": 1}
        file.write_text(json.dumps({"values": values, "reasons": dict.fromkeys(kept, "x")}))
        again = sampler(choice=Choice.of_file(file), max_batch=None)
        again.generate(PROMPTS, max_new_tokens=4)
        assert again.copies == merge and again.max_batch == 1
    file.write_text("{")
    with pytest.raises(InputError, match="delete it to decide anew"):
        Choice.of_file(file)


def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    for rank, written in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        choice = Choice(tmp_path / "rollout.json")
        choice.set("engine", "decode", "why")
        choice.write()
        assert (tmp_path / "rollout.json").exists() == written


def test_merged_on_a_cpu_that_holds_the_copy_and_not_on_a_gpu(monkeypatch):
    engine = sampler()
    assert engine.copies and "merge: True (on a CPU" in engine.explain()
    assert "no LoRA adapter" in sampler(tiny_model()).explain()
    monkeypatch.setattr(rollout_memory, "free_bytes", lambda device: 1000)
    assert "merge: True (merge_adapter=True was given)" in sampler(merge_adapter=True, max_batch=3).explain()
    engine = sampler()
    assert not engine.copies and "merge: False (the copy would take over half of what is free)" in engine.explain()
    assert copy_for_answers(lora_model(), None, "cuda", 2**40)[1] is False


def test_a_kept_engine_that_is_gone_is_told(tmp_path):
    file = tmp_path / "rollout.json"
    file.write_text('{"values": {"engine": "continuous"}, "reasons": {"engine": "timed"}}')
    with pytest.raises(InputError, match="'continuous'.*rollout.json"):
        TransformersRollout(tiny_model(), stop_token_ids=[256], choice=Choice.of_file(file))
    kept = TransformersRollout(tiny_model(), stop_token_ids=[256], choice=Choice.of_file(file), engine="generate")
    assert "engine: generate" in kept.explain()

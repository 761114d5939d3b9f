"""What a sampler decides for itself: merged or not, by time and exactness, once, and kept in a file."""

import json

import pytest
import torch
from tiny import lora_model, tiny_model

from opcd_fast import rollout as rollout_module
from opcd_fast import rollout_choice
from opcd_fast.errors import InputError
from opcd_fast.rollout import TransformersRollout
from opcd_fast.rollout_choice import Choice, agree, faster

PROMPTS = [[*range(20, 40), 41], [*range(20, 40), 43, 44]]


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(rollout_module, "WORTH_MEASURING", 0)
    monkeypatch.setattr(rollout_module, "UNTIMED", ())


def sampler(model=None, **options):
    return TransformersRollout(model or lora_model(), stop_token_ids=[256], **options)


@pytest.mark.parametrize("slow", ["merged", "unmerged"])
def test_the_faster_one_is_taken(measured, monkeypatch, slow):
    seen, clock = {}, [0.0]
    inner = TransformersRollout._run

    def run(self, engine, model, *arguments, **options):
        merged = model is not self.model
        clock[0] += (10.0 if merged == (slow == "merged") else 1.0) * arguments[1].shape[1]
        seen[merged] = seen.get(merged, 0) + 1
        return inner(self, engine, model, *arguments, **options)

    monkeypatch.setattr(rollout_choice.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(TransformersRollout, "_run", run)
    engine = sampler()
    wanted = sampler(merge_adapter=False).generate(PROMPTS, max_new_tokens=12, seed=1)
    got = engine.generate(PROMPTS, max_new_tokens=12, seed=1)
    assert [a.token_ids for a in got] == [a.token_ids for a in wanted]
    assert seen[True] and seen[False]
    assert (engine._merged is not None) == (slow == "unmerged")
    assert f"merge: {slow == 'unmerged'} (2 prompts, estimated for 12 tokens: merged " in engine.explain()
    seen.clear()
    engine.generate(PROMPTS, max_new_tokens=12, seed=1)
    assert sum(seen.values()) == 1, "measured once"


def test_an_inexact_copy_is_not_taken(measured, monkeypatch):
    from opcd_fast.merged import MergedCopy

    good = MergedCopy.refresh

    def bad(self):
        model = good(self)
        with torch.no_grad():
            self._pairs[0][1].mul_(1.2)
        return model

    monkeypatch.setattr(MergedCopy, "refresh", bad)
    engine = sampler()
    engine.generate(PROMPTS, max_new_tokens=4)
    assert engine._merged is None and "merge: False (merged log-probabilities differ by" in engine.explain()


def test_no_copy_where_memory_is_short(measured, monkeypatch):
    monkeypatch.setattr(rollout_module.rollout_memory, "free_bytes", lambda device: 1000)
    engine = sampler()
    engine.generate(PROMPTS, max_new_tokens=4)
    assert engine._merged is None and "over half of what is free" in engine.explain()


def test_what_is_given_is_not_measured(measured):
    engine = sampler(merge_adapter=True, max_batch=3)
    assert engine._merged is not None and "merge: True (merge_adapter=True was given)" in engine.explain()
    assert "no LoRA adapter" in sampler(tiny_model()).explain()


def test_the_choice_is_kept_and_comes_back(measured, monkeypatch, tmp_path):
    file = tmp_path / "rollout.json"
    first = sampler(choice=Choice(file), max_batch=None)
    assert not file.exists(), "nothing is written before the first answers"
    first.generate(PROMPTS, max_new_tokens=4)
    kept = json.loads(file.read_text())["values"]
    assert set(kept) == {"engine", "merge", "batch"}
    monkeypatch.setattr(TransformersRollout, "_measured", lambda *a: 1 / 0)
    monkeypatch.setattr(TransformersRollout, "_verified", lambda *a: 1 / 0)
    for merge in (True, False):
        values = {**kept, "merge": merge, "batch": 1}
        file.write_text(json.dumps({"values": values, "reasons": dict.fromkeys(kept, "x")}))
        again = sampler(choice=Choice.of_file(file), max_batch=None)
        again.generate(PROMPTS, max_new_tokens=4)
        assert (again._merged is not None) == merge and again.max_batch == 1
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


def test_the_cpu_and_small_models_are_not_timed(monkeypatch):
    """A choice by the clock could differ between a run and its repetition."""
    assert "merge: True (on the CPU, where the copy is faster)" in sampler().explain()
    monkeypatch.setattr(rollout_module, "UNTIMED", ())
    assert "merge: False (small model: not measured)" in sampler().explain()
    monkeypatch.undo()
    monkeypatch.setattr(rollout_module.rollout_memory, "free_bytes", lambda device: 1000)
    assert "merge: False (the copy would take over half of what is free)" in sampler().explain()


def test_sync_and_moved_weights_fold_again(monkeypatch):
    model = lora_model()
    engine = sampler(model, merge_adapter=True)
    folds = []
    good = engine._merged.refresh
    monkeypatch.setattr(engine._merged, "refresh", lambda: folds.append(1) or good())
    before = engine.generate(PROMPTS, max_new_tokens=6)
    engine.generate(PROMPTS, max_new_tokens=6)
    assert len(folds) == 1, "weights that did not move are not folded again"
    up = next(p for n, p in model.named_parameters() if "lora_B" in n)
    up.data.mul_(30)  # leaves no trace in the version counter
    engine.sync(model)
    after = engine.generate(PROMPTS, max_new_tokens=6)
    assert len(folds) == 2 and after != before
    with torch.no_grad():
        up.mul_(0.5)
    engine.generate(PROMPTS, max_new_tokens=6)
    assert len(folds) == 3
    with pytest.raises(InputError, match="the model it was made with"):
        engine.sync(tiny_model())


def test_agree_compares_up_to_the_first_difference():
    one = ([1, 2, 3], [-1.0, -2.0, -3.0])
    assert agree([one], [one], torch.float32) == (True, 0.0)
    assert agree([one], [([1, 9, 9], [-1.0, -2.0, -7.0])], torch.float32)[0], "a tie, then another answer"
    assert not agree([one], [([1, 2, 3], [-1.0, -2.0, -3.1])], torch.float32)[0]
    assert not agree([one], [([1, 9], [-1.0, -2.5])], torch.float32)[0]
    assert not agree([one], [([1, 2], [float("nan"), -2.0])], torch.float32)[0]


def test_what_a_token_costs_is_carried_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rollout_choice.time, "perf_counter", lambda: now[0])

    def costs(start, per_token):
        def run(count):
            now[0] += start + per_token * count

        return run

    # Slow to start and cheap per token: worth it for many tokens only.
    candidates = {"a": costs(1.0, 0.1), "b": costs(0.0, 0.5)}
    cpu = torch.device("cpu")
    assert faster(candidates, few=1, many=2, wanted=2, device=cpu)[0] == "b"
    name, seconds = faster(candidates, few=1, many=2, wanted=100, device=cpu)
    assert name == "a" and seconds["a"] == pytest.approx(11.0) and seconds["b"] == pytest.approx(50.0)
    assert faster(candidates, few=1, many=1, wanted=1, device=cpu)[0] == "b"

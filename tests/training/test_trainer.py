"""The loop on a tiny model: it learns, it counts right, it resumes bit for bit, and it refuses what cannot work."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from resumption import cut_and_resumed
from tiny import tiny_model, tiny_tokenizer
from training_runs import losses, make

from opcd_fast import OPCDConfig
from opcd_fast.errors import InputError
from opcd_fast.models import shared_prompt_hidden_states


@pytest.mark.parametrize(
    ("lora_rank", "dtype", "steps", "bound"),
    [(4, "float32", 30, 0.7), (0, "float32", 12, 0.8), (4, "bfloat16", 24, 0.8), (0, "bfloat16", 24, 0.8)],
)
def test_training_moves_the_student_towards_a_teacher_that_stays(tokenizer, tmp_path, lora_rank, dtype, steps, bound):
    trainer = make(
        tokenizer, tmp_path / "run", lora_rank=lora_rank, dtype=dtype, steps=steps, batch_size=6, eval_every=steps,
        learning_rate=1e-2 if lora_rank else 3e-3,
    )  # fmt: skip
    still = {n: p for n, p in trainer.teacher_rollout.model.named_parameters() if "lora" not in n}
    before = {n: p.detach().clone() for n, p in still.items()}
    first, last = trainer.train().evaluations
    assert last["fixed_kl"] < bound * first["fixed_kl"] and last["own_kl"] < bound * first["own_kl"]
    assert before and all(torch.equal(p, before[n]) for n, p in still.items())
    assert {p.dtype for p in still.values()} == {getattr(torch, dtype)}
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}, "masters"


def test_the_divergence_that_is_asked_for_is_minimised(tokenizer, tmp_path):
    def first_loss(**settings):
        trainer = make(tokenizer, tmp_path / "run", steps=1, eval_every=1, **settings)
        result = trainer.train()
        shutil.rmtree(tmp_path / "run")
        return losses(result)[0], result.evaluations[0]["own_kl"]

    plain, own_kl = first_loss(divergence="reverse_kl")
    assert first_loss(divergence="jsd", beta=1.0) == (plain, own_kl)
    assert first_loss(divergence="skew_reverse_kl", alpha=0.0) == (plain, own_kl)
    assert first_loss(divergence="topk_reverse_kl", k=10_000)[0] == pytest.approx(plain, rel=1e-4)
    others = [
        {"divergence": "gated_kl"}, {"divergence": "gated_kl", "gate": "tv"}, {"divergence": "forward_kl"},
        {"divergence": "jsd"}, {"divergence": "jsd", "beta": 0.1},
        {"divergence": "skew_reverse_kl"}, {"divergence": "skew_forward_kl", "alpha": 0.4},
        {"divergence": "topk_reverse_kl", "k": 3}, {"divergence": "topk_reverse_kl", "k": 3, "tail": "bucket"},
    ]  # fmt: skip
    found = [first_loss(**settings) for settings in others]
    assert len({round(loss, 5) for loss, _ in found} | {round(plain, 5)}) == len(others) + 1
    assert {kl for _, kl in found} == {own_kl}  # evaluations always report the reverse KL


def test_the_gate_is_recorded_where_there_is_one(tokenizer, tmp_path):
    settings = {"steps": 1, "batch_size": 1, "max_new_tokens": 1}
    (gated,) = make(tokenizer, tmp_path / "gated", divergence="gated_kl", **settings).train().history
    (reverse,) = make(tokenizer, tmp_path / "reverse", divergence="reverse_kl", **settings).train().history
    (forward,) = make(tokenizer, tmp_path / "forward", divergence="forward_kl", **settings).train().history
    assert gated["gate"] == pytest.approx(1 - math.exp(-reverse["loss"]), rel=1e-4)  # of one token
    mixed = (1 - gated["gate"]) * reverse["loss"] + gated["gate"] * forward["loss"]
    assert 0.01 < gated["gate"] < 0.99 and gated["loss"] == pytest.approx(mixed, rel=1e-4)
    assert "gate" not in reverse and "gate" not in forward


def test_a_resumed_run_keeps_its_divergence(tokenizer, tmp_path):
    for name, settings in (("jsd", {"divergence": "jsd", "beta": 0.3}), ("plain", {"divergence": "reverse_kl"})):
        run = partial(make, tokenizer, tmp_path / name)
        run(steps=2, **settings).train()
        again = run(steps=4, resume=True)
        assert {key: getattr(again.config, key) for key in settings} == settings
        assert losses(again.train()) == losses(make(tokenizer, tmp_path / f"{name}-whole", steps=4, **settings).train())
        for other in ("forward_kl", "gated_kl"):
            with pytest.raises(InputError, match="divergence differs"):
                run(steps=6, resume=True, divergence=other).train()
    assert OPCDConfig().divergence == "gated_kl"


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_micro_batches_do_not_change_the_step(tokenizer, tmp_path, normalize):
    whole = make(tokenizer, tmp_path / "a", normalize=normalize, steps=3).train()
    parts = make(tokenizer, tmp_path / "b", normalize=normalize, steps=3, micro_batch_tokens=60).train()
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-4)
    assert [r["grad_norm"] for r in whole.history] == pytest.approx([r["grad_norm"] for r in parts.history], rel=1e-3)


@pytest.mark.parametrize(("lora_rank", "moment"), [(4, ("step", 5)), (0, ("step", 5)), (4, ("evaluation", 4))])
def test_resume_is_bit_identical(tokenizer, tmp_path, lora_rank, moment):
    settings = {"lora_rank": lora_rank, "steps": 6, "learning_rate": 5e-3}
    whole = make(tokenizer, tmp_path / "whole", **settings).train()
    resumed = cut_and_resumed(partial(make, tokenizer, **settings), tmp_path / "cut", moment)
    assert losses(resumed) == losses(whole)
    assert [e["step"] for e in resumed.evaluations] == [0, 2, 4, 6]
    assert [e["fixed_kl"] for e in resumed.evaluations] == [e["fixed_kl"] for e in whole.evaluations]
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["resume"] is True
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_resume_refuses_another_job_and_a_damaged_checkpoint(tokenizer, tmp_path):
    folder = tmp_path / "run"
    trainer = make(tokenizer, folder)
    trainer.train()
    with pytest.raises(InputError, match="make a new trainer"):
        trainer.train()
    with pytest.raises(InputError, match="already holds a run"):
        make(tokenizer, folder)
    with pytest.raises(InputError, match="no checkpoint"):
        make(tokenizer, tmp_path / "empty", resume=True)
    for words, settings in (
        ("temperature differs", {"temperature": 0.5}),
        ("prompts and context differs", {"context": "another"}),
        ("first weights differs", {"model": tiny_model(seed=9)}),
        ("4 steps already", {"steps": 3}),
    ):
        with pytest.raises(InputError, match=words):
            make(tokenizer, folder, **{"resume": True, "steps": 6, **settings}).train()
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    (newest / "optimizer.pt").write_bytes(b"garbage")
    with pytest.raises(InputError, match="damaged"):
        make(tokenizer, folder, resume=True, steps=6).train()


def test_a_checkpoint_from_before_a_setting_goes_on_with_its_default(tokenizer, tmp_path):
    make(tokenizer, tmp_path / "run").train()
    state = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "state.json"
    kept = json.loads(state.read_text())
    for name in ("answers", "objective", "optimizer", "use_dora", "num_virtual_tokens"):
        del kept["identity"][name]
    state.write_text(json.dumps(kept))
    state.with_name("manifest.json").unlink()  # which that version did not write
    with pytest.raises(InputError, match="optimizer differs from the run.*'adamw_torch' there, 'adafactor' now"):
        make(tokenizer, tmp_path / "run", resume=True, steps=6, optimizer="adafactor").train()
    assert make(tokenizer, tmp_path / "run", resume=True, steps=6).train().steps == 6


def test_records_checkpoints_and_weights_on_disk(tokenizer, tmp_path):
    result = make(tokenizer, tmp_path / "run", steps=6, keep_checkpoints=2).train()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006"]
    for record in result.history:
        assert record["loss"] > 0 and record["grad_norm"] > 0 and 0 <= record["top1_agreement"] <= 1
        assert set(record["seconds"]) == {"rollout", "teacher", "student", "loss", "backward", "optimizer"}
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "run" / "final")
    make(tokenizer, tmp_path / "again", steps=6).train()  # the same run again gives the same adapter
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "again" / "final")
    a, b = dict(loaded.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any("lora_B" in n and a[n].abs().sum() > 0 for n in a)


def test_a_teacher_with_a_padded_head_works_when_the_tokenizer_is_the_same(tokenizer, tmp_path):
    padded = tiny_model(seed=7, vocab_size=272)
    padded.lm_head.weight.data[261:] = 5 * padded.lm_head.weight.data[:11]  # padding that would be drawn
    settings = {"teacher_tokenizer": tiny_tokenizer(), "lora_rank": 0, "learning_rate": 3e-3, "eval_every": 8}
    trainer = make(tokenizer, tmp_path / "run", teacher_model=padded, steps=8, **settings)
    result = trainer.train()
    assert trainer.teacher_rollout.model is padded
    assert result.evaluations[-1]["fixed_kl"] < result.evaluations[0]["fixed_kl"]
    written = json.loads((tmp_path / "run" / "eval_fixed.json").read_text())
    assert max(max(sample["response"]) for sample in written) < 261


def test_every_epoch_visits_every_prompt(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path / "run", batch_size=4, rollouts_per_prompt=2)
    drawn = [row for step in range(3) for row in trainer.source.rows_of(step)]
    assert len(drawn) == 24
    ids = [row.student_ids for row in drawn[::2]]
    assert [row.student_ids for row in drawn[1::2]] == ids
    assert sorted(ids[:6]) == sorted(ids[6:]) == sorted(row.student_ids for row in trainer.train_rows)
    assert ids[:6] != ids[6:]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_weights_are_touched(tokenizer, tmp_path, where, monkeypatch):
    trainer = make(tokenizer, tmp_path / "run", eval_prompts=None, steps=4)
    step = []
    inner = trainer._objective

    def poisoned(*arguments, **options):
        loss, stats = inner(*arguments, **options)
        if torch.is_grad_enabled():
            step.append(1)
        if len(step) == 3:
            loss = loss * (float("nan") if where == "loss" else 1.0)
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss, stats

    monkeypatch.setattr(trainer, "_objective", poisoned)
    with pytest.raises(InputError, match="step 3"):
        trainer.train()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000002"]
    assert all(bool(p.isfinite().all()) for p in trainer.parameters.values())


def test_settings_reach_what_they_set(tokenizer, tmp_path, monkeypatch):
    """Every option here once was, or could be, accepted and ignored."""
    trainer = make(
        tokenizer, tmp_path / "run", temperature=0.7, top_p=0.8, stop_tokens=("z",), weight_decay=0.25, lora_rank=3,
        lora_alpha=12, lora_targets="q_proj", teacher_path="concat", learning_rate=None, rollout_batch=2, steps=1,
        max_grad_norm=1e-3, gradient_checkpointing=True, merge_for_rollout=False, eval_prompts=None,
    )  # fmt: skip
    assert trainer.teacher.path == "concat"
    assert trainer.rollout.stop_token_ids == (256, tokenizer.get_vocab()["z"])
    assert trainer.rollout.max_batch == 2 and not trainer.rollout.copies
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.25)
    lora = trainer.model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, set(lora.target_modules)) == (3, 12, {"q_proj"})
    asked, layers = [], []
    inner = trainer.rollout.generate
    monkeypatch.setattr(trainer.rollout, "generate", lambda p, **o: asked.append(o) or inner(p, **o))
    layer = trainer.model.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda module, _: layers.append(module.training))
    gradients, step = [], trainer.engine.step
    kept = lambda n: gradients.extend(p.grad for p in trainer.parameters.values()) or step(n)  # noqa: E731
    monkeypatch.setattr(trainer.engine, "step", kept)
    trainer.train()
    assert (asked[0]["temperature"], asked[0]["top_p"], asked[0]["max_new_tokens"]) == (0.7, 0.8, 6)
    assert layers.count(True) == 2, "a checkpointed layer runs twice in training: forward and recomputation"
    assert float(torch.stack([g.norm() for g in gradients]).norm()) <= 1.001e-3
    assert all(p.grad is None for p in trainer.parameters.values()), "nothing holds them while answers are drawn"


def test_dropout_is_part_of_the_seeded_step(tokenizer, tmp_path):
    dropped = [make(tokenizer, tmp_path / f"{i}", tiny_model(attention_dropout=0.3), steps=2).train() for i in range(2)]
    plain = make(tokenizer, tmp_path / "plain", steps=2).train()
    assert losses(dropped[0]) == losses(dropped[1])
    assert losses(dropped[0]) != losses(plain)


def test_a_peft_model_goes_on_training_its_adapter_against_its_base(tokenizer, tmp_path):
    from peft import PeftModel

    make(tokenizer, tmp_path / "first", steps=4).train()
    model = PeftModel.from_pretrained(tiny_model(dtype=torch.bfloat16), tmp_path / "first" / "final")
    trainer = make(tokenizer, tmp_path / "second", model, lora_rank=0, learning_rate=None, dtype="bfloat16", steps=4)
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}
    assert all("lora_" in name for name in trainer.parameters) and trainer.parameters
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in trainer.parameters.items())


def test_bounds_of_the_teacher_are_free_on_resume_and_in_effect(tokenizer, tmp_path, monkeypatch):
    make(tokenizer, tmp_path / "run", steps=1).train()
    trainer = make(tokenizer, tmp_path / "run", steps=2, resume=True, prefix_device="cpu", teacher_batch_bytes=1)
    passes, honest = [], trainer.teacher._run

    def counting(path, ids, row, index):
        passes.append(len(row.lengths))
        return honest(path, ids, row, index)

    monkeypatch.setattr(trainer.teacher, "_run", counting)
    trainer.train()
    assert set(passes) == {1} and len(passes) >= 4, "every sequence runs alone"
    assert "kept on cpu" in trainer.teacher.explain()
    trainer = make(tokenizer, tmp_path / "run", steps=3, resume=True, max_prefix_bytes=1)
    trainer.train()
    memory = trainer.teacher._prefixes
    assert memory.evicted and memory.built > 1, "not kept between calls"


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 0, "learning_rate": 3e-3, "micro_batch_tokens": 700}])
def test_shared_prompts_change_nothing_but_the_work(tokenizer, tmp_path, monkeypatch, settings):
    calls = []

    def counted(*args, **options):
        calls.append(0)
        return shared_prompt_hidden_states(*args, **options)

    monkeypatch.setattr("opcd_fast.training.step.objective.shared_prompt_hidden_states", counted)

    def history(name, share):
        calls.clear()
        trainer = make(tokenizer, tmp_path / name, rollouts_per_prompt=4, batch_size=2, share_prompts=share, **settings)
        return trainer.train().history

    alone = history("alone", False)
    assert not calls
    for name, share in (("asked", True), ("default", None)):
        shared = history(name, share)
        assert len(calls) >= len(shared) == 4
        for record, reference in zip(shared, alone, strict=True):
            assert record["response_tokens"] == reference["response_tokens"]
            for field in ("loss", "kl_per_token", "student_entropy", "grad_norm"):
                assert record[field] == pytest.approx(reference[field], rel=1e-4), field


def test_prompts_are_shared_by_default_where_the_model_can(tokenizer, tmp_path, caplog):
    assert make(tokenizer, tmp_path / "a", rollouts_per_prompt=2).share_prompts is True
    assert make(tokenizer, tmp_path / "e", share_prompts=False).share_prompts is False
    with caplog.at_level("WARNING", "opcd_fast"):
        dropping = tiny_model(attention_dropout=0.1)
        assert make(tokenizer, tmp_path / "c", dropping, rollouts_per_prompt=2).share_prompts is False
    assert "attention_dropout=0.1" in caplog.text

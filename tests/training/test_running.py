"""A run as a whole: early stop, best weights, warnings, scores, signals, trackers; and all of it through a resume."""

import copy
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file
from tiny import tiny_model
from training_runs import lines_of, losses, make

from opcd_fast.errors import InputError
from opcd_fast.rollout import TransformersRollout
from opcd_fast.training import Interrupted
from opcd_fast.training.monitoring.tracking import numbers_of
from opcd_fast.training.run import checkpoints as checkpoint


def weights_in(folder):
    return load_file(next(folder.glob("*.safetensors")))


class Memory(GeneralTracker):
    name, requires_logging_directory = "memory", False

    def __init__(self):
        super().__init__(_blank=True)
        self.configs, self.logged, self.ended = [], [], 0

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.configs.append(values)

    def log(self, values, step=None, **_):
        self.logged.append((step, values))

    def finish(self):
        self.ended += 1


def test_every_number_reaches_the_trackers(tokenizer, tmp_path):
    memory = Memory()
    make(tokenizer, tmp_path / "run", trackers=[memory]).train()
    assert memory.ended == 1 and len(memory.configs) == 1
    assert memory.configs[0]["learning_rate"] == 1e-2 and memory.configs[0]["micro_batch_tokens"] == "None"
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    written = [record for record in written if record["kind"] != "warning"]
    assert [step for step, _ in memory.logged] == [record["step"] for record in written] == [0, 1, 2, 2, 3, 4, 4]
    for (_, values), record in zip(memory.logged, written):
        group = {"step": "train", "evaluation": "eval"}[record["kind"]]
        parts = record.pop("seconds", {})
        numbers = {f"{group}/{k}": v for k, v in record.items() if k != "step" and not isinstance(v, str)}
        assert values == {**numbers, **{f"train/seconds/{part}": v for part, v in parts.items()}}
        assert any(name.startswith(f"{group}/") for name in values)
    assert numbers_of({"kind": "step", "step": 3, "loss": 1.0, "note": "x", "seconds": {"a": 2.0}}) == {
        "train/loss": 1.0, "train/seconds/a": 2.0,
    }  # fmt: skip


def test_tensorboard_files(tokenizer, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"trackers": ("tensorboard",), "save_every": 3}
    with pytest.raises(Interrupted):
        make(tokenizer, tmp_path / "run", steps=5, callbacks=[stop_at(4)], **settings).train()
    # As if it had been killed there: the newest checkpoint is that of step 3.
    shutil.rmtree(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    result = make(tokenizer, tmp_path / "run", steps=6, resume=True, **settings).train()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "opcd"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(result))
    assert [e.step for e in events.Scalars("eval/own_kl")] == [0, 2, 4, 6]


def test_wandb_offline_keeps_both_runs_in_the_folder(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps, resume in ((2, False), (4, True)):
        make(tokenizer, tmp_path / "run", steps=steps, resume=resume, trackers=("wandb",)).train()
    written = [file.read_bytes() for file in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))]
    assert len(written) == 2, "a resumed run is another one"
    for content in written:
        for name in (b"train/loss", b"train/seconds/rollout", b"eval/own_kl", b"lora_rank"):
            assert name in content, name


def stop_at(step):
    def callback(record):
        if (record["kind"], record["step"]) == ("step", step):
            os.kill(os.getpid(), signal.SIGTERM)

    return callback


def frozen_sampler(seed):
    """Samples from weights that never follow the student's."""
    sampler = TransformersRollout(tiny_model(seed), stop_token_ids=(256,), vocab_size=261)
    sampler.sync = lambda model: None
    return sampler


def test_the_sampler_of_a_plain_run_does_not_drift(tokenizer, tmp_path):
    plain = make(tokenizer, tmp_path / "a", steps=6).train()
    for record in plain.history:
        assert record["sampler_distance"] < 1e-4 and abs(record["sampler_kl"]) < 1e-6
    stale = make(tokenizer, tmp_path / "b", steps=8, lora_rank=0, learning_rate=2e-2)
    stale.samplers.student = frozen_sampler(0)
    result = stale.train()
    drifts = [record["sampler_kl"] for record in result.history]
    assert drifts[0] < 1e-6 and min(drifts[4:]) > 0.02
    assert "sampler_drift" in {warning["name"] for warning in result.warnings}
    assert "sampler_drift" not in {warning["name"] for warning in plain.warnings}


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_the_correction_is_used(tokenizer, tmp_path, correction):
    def train(folder, **settings):
        trainer = make(tokenizer, tmp_path / folder, steps=2, **settings)
        trainer.samplers.student = frozen_sampler(8)
        return trainer.train().history

    plain = train("plain")
    corrected = train("corrected", importance_correction=correction)
    bounded = train("bounded", importance_correction=correction, importance_clip=1e-6)
    assert plain[0]["kl_per_token"] == corrected[0]["kl_per_token"], "measured, not weighted"
    assert 0 < corrected[0]["importance_weight"] <= 2 and corrected[0]["loss"] != plain[0]["loss"]
    assert 0 < bounded[0]["loss"] < 1e-5 * plain[0]["loss"]


def test_early_stop_ends_the_run_and_says_so(tokenizer, tmp_path):
    settings = {"steps": 20, "early_stop_patience": 2, "early_stop_delta": 100.0, "eval_every": 3, "save_every": 0}
    result = make(tokenizer, tmp_path / "run", **settings).train()
    assert result.stopped_early and result.steps == 6 and len(result.history) == 6
    assert [e["step"] for e in result.evaluations] == [0, 3, 6]
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000006"]
    assert (tmp_path / "run" / "final").is_dir()
    again = make(tokenizer, tmp_path / "run", resume=True, **settings).train()
    assert again.steps == 6 and again.stopped_early
    settings["early_stop_delta"] = 0.0
    more = make(tokenizer, tmp_path / "run", resume=True, **{**settings, "steps": 9}).train()
    assert more.steps == 9 and not more.stopped_early


def test_best_weights_are_those_of_the_best_evaluation(tokenizer, tmp_path):
    """A scorer that likes step 2 best: best/ holds its weights, final/ the last ones."""
    values = iter([9.0, 1.0, 3.0, 2.0])  # before training, and after steps 1, 2 and 3

    def scorer(messages, answer, row):
        return next(values)

    seen = {}

    def remember(record):
        if record["kind"] == "step":
            seen[record["step"]] = {n: p.detach().clone() for n, p in trainer.parameters.items()}

    trainer = make(
        tokenizer, tmp_path / "run", steps=3, eval_every=1, save_every=0, scorer=scorer, save_best=True,
        best_by="score", callbacks=[remember], eval_prompts=["one"],
    )  # fmt: skip
    result = trainer.train()
    assert result.best_step == 2 and [e["score"] for e in result.evaluations] == [9.0, 1.0, 3.0, 2.0]
    noted = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert noted["step"] == 2 and noted["score"] == 3.0
    for folder, step in (("best", 2), ("final", 3)):
        kept = weights_in(tmp_path / "run" / folder)
        assert len(kept) == len(seen[step]) > 0
        for name, value in seen[step].items():
            assert torch.equal(kept[name.replace(".default.", ".")], value)
    from opcd_fast.models import load_tokenizer

    load_tokenizer(tmp_path / "run" / "best")


def test_a_scorer_sees_prompts_answers_and_rows(tokenizer, tmp_path):
    seen = []

    def scorer(messages, answer, row):
        seen.append((copy.deepcopy(messages), row))
        messages[0]["content"] = "mine now"  # must not reach the next evaluation
        assert isinstance(answer, str) and "<|end|>" not in answer
        return len(answer)

    rows = [{"prompt": "one", "wanted": "z"}, {"prompt": [{"role": "user", "content": "two"}]}]
    result = make(tokenizer, tmp_path / "run", steps=2, scorer=scorer, eval_prompts=rows).train()
    assert seen[:2] == seen[2:4] == [([{"role": "user", "content": t}], r) for t, r in zip(("one", "two"), rows)]
    record = result.evaluations[-1]
    assert record["score_low"] <= record["score"] <= record["score_high"]
    with pytest.raises(InputError, match="scorer differs"):
        make(tokenizer, tmp_path / "run", steps=3, resume=True, eval_prompts=rows).train()


def test_warnings_are_told_once_and_kept(tokenizer, tmp_path, caplog):
    with caplog.at_level("WARNING", "opcd_fast"):
        result = make(tokenizer, tmp_path / "run", steps=8).train()
    assert [w["name"] for w in result.warnings] == ["cut_answers"]  # six tokens are never enough here
    assert caplog.text.count("cut at max_new_tokens") == 1
    assert [line["step"] for line in lines_of(tmp_path / "run") if line["kind"] == "warning"] == [5]
    with caplog.at_level("WARNING", "opcd_fast"):
        caplog.clear()
        again = make(tokenizer, tmp_path / "run", steps=10, resume=True).train()
    assert again.warnings == result.warnings and "cut at max_new_tokens" not in caplog.text


STOPPED = {"steps": 5, "save_every": 2, "save_best": True, "early_stop_patience": 9}


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """The folder and the result of a run that no signal disturbs."""
    folder = tmp_path_factory.mktemp("signals") / "whole"
    return folder, make(tokenizer, folder, **STOPPED).train()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["rollout", "loss", "optimizer", "evaluation", "fixed", "saving"])
def test_a_signal_saves_and_the_rest_is_the_same(whole, tokenizer, tmp_path, number, moment, monkeypatch):
    trainer = make(tokenizer, tmp_path / "run", **STOPPED)
    calls = []

    def interrupting(inner, at):
        def wrapped(*args, **options):
            calls.append(0)
            if len(calls) == at:
                os.kill(os.getpid(), number)
                for _ in range(1000):
                    pass
            return inner(*args, **options)

        return wrapped

    owner, name, at, saved = {
        # before the first step the rollout also makes the evaluation's answers
        "rollout": (trainer.rollout, "generate", 5, 2),  # evaluation, 1, 2, evaluation, 3
        "loss": (trainer, "_objective", 3, 2),
        "optimizer": (trainer.engine, "step", 3, 3),
        "evaluation": (sys.modules["opcd_fast.training.trainer"], "held_out_record", 2, 2),
        "fixed": (trainer.teacher_rollout, "generate", 1, 0),
        "saving": (trainer, "_save_checkpoint", 1, 2),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupting(getattr(owner, name), at))
        with pytest.raises(Interrupted, match=f"step {saved} is saved") as stop:
            trainer.train()
    assert stop.value.status == 128 + number
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{saved:06d}"
    assert not (tmp_path / "run" / "final").exists()
    folder, result = whole
    assert make(tokenizer, tmp_path / "run", resume=True, **STOPPED).train().best_step == result.best_step
    assert lines_of(tmp_path / "run") == lines_of(folder)
    for kept in ("final", "best"):
        ours, theirs = (weights_in(run / kept) for run in (tmp_path / "run", folder))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_best_is_written_again_where_a_run_was_killed_before_it(tokenizer, tmp_path, monkeypatch):
    settings = {"steps": 4, "save_best": True, "best_by": "fixed_kl", "learning_rate": 1e-3}
    trainer = make(tokenizer, tmp_path / "run", **settings)

    class Killed(Exception):
        pass

    def killed(record, fill):
        raise Killed

    monkeypatch.setattr(trainer.folder, "save_best", killed)
    with pytest.raises(Killed):
        trainer.train()
    assert not (tmp_path / "run" / "best").exists()
    step = json.loads((checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json").read_text())
    make(tokenizer, tmp_path / "run", resume=True, **{**settings, "steps": step["step"]}).train()
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text())["step"] == step["step"]


def test_plots_are_drawn_and_a_failing_one_ends_nothing(tokenizer, tmp_path, monkeypatch, caplog):
    drawn = []

    def full(folder, history, evaluations):
        drawn.append((len(history), len(evaluations)))
        if len(drawn) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("opcd_fast.training.monitoring.journal.plot_run", full)
    with caplog.at_level("WARNING", "opcd_fast"):
        make(tokenizer, tmp_path / "run", plots=True, steps=6).train()
    assert drawn == [(0, 1), (2, 2), (4, 3)] and caplog.text.count("plots cannot be written") == 1

"""`opcd train --init RUN --replay`: who starts where, and who teaches what."""

import json

import pytest
import torch
from report_runs import CONTEXT, HELD_OUT, TRAIN, make_run, save_base, write_lines

from opcd_fast.cli import main
from opcd_fast.data import read_prompts, teacher_ids
from opcd_fast.evaluation import distances
from opcd_fast.evaluation.report import ReportOptions, measure
from opcd_fast.evaluation.report.models import load_run
from opcd_fast.models import load_model
from opcd_fast.training.run import run_settings

NEW = "always answer with yyy and nothing more"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=[4, 0], ids=["lora", "full"])
def old(request, base, tmp_path_factory):
    rate = 1e-2 if request.param else 3e-3
    return make_run(base, tmp_path_factory.mktemp("old") / "r", lora_rank=request.param, learning_rate=rate)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "new.txt").write_text(NEW)
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"new {i}"} for i in range(4)])
    write_lines(tmp_path / "eval.jsonl", [{"prompt": text} for text in HELD_OUT])
    return tmp_path


def train(base, old, files, *more):
    return main([
        "train", "--model", str(base), "--init", str(old), "--context", str(files / "new.txt"),
        "--prompts", str(files / "prompts.jsonl"), "--eval-prompts", str(files / "eval.jsonl"),
        "--output-dir", str(files / "run"), "--batch-size", "4", "--max-new-tokens", "4", "--device", "cpu",
        "--dtype", "float32", "--learning-rate", "1e-12", "--steps", "1", *more,
    ])  # fmt: skip


def test_it_starts_from_the_run_and_learns_from_its_base_with_the_new_context(base, old, files):
    assert train(base, old, files) == 0
    before, after = (load_model(folder / "final", dtype="float32", device="cpu") for folder in (old, files / "run"))
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)  # the rate is next to nothing
    record = json.loads((files / "run" / "run.json").read_text())
    assert record["context"] == NEW and record["teacher"] is None
    assert record["base"]["files"] == json.loads((old / "run.json").read_text())["base"]["files"]
    evaluation = json.loads((files / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert evaluation["kind"] == "evaluation"
    assert measure(files / "run", ReportOptions(max_new_tokens=4))["base_model"] == base.name
    # What the student was held to: the old run's base with the new context, read by hand from their files.
    samples = json.loads((files / "run" / "eval_fixed.json").read_text())
    models = load_run(files / "run", record, run_settings(files / "run"), None)
    prompts = read_prompts(HELD_OUT)
    within = [teacher_ids(models.tokenizer, prompt, NEW) for prompt in prompts]
    answers = [sample["response"] for sample in samples]
    student = models.student.reader([sample["student_prompt"] for sample in samples]).read(answers)
    found = distances(student, models.base.reader(within).read(answers), 1.0)
    assert sum(one.kl for one in found) / len(found) == pytest.approx(evaluation["fixed_kl"], rel=1e-3)


def test_replayed_prompts_keep_the_old_context(base, old, files):
    assert train(base, old, files, "--replay", "0.5") == 0
    rows = [json.loads(line) for line in (files / "run" / "prompts.jsonl").read_text().splitlines()]
    replayed = [row for row in rows if "privileged_context" in row]
    assert len(rows) == 8 and len(replayed) == 4
    assert {row["privileged_context"] for row in replayed} == {CONTEXT}
    assert {row["messages"][0]["content"] for row in replayed} < set(TRAIN)
    assert json.loads((files / "run" / "run.json").read_text())["init"]["replayed"] == 4


def test_a_file_of_replayed_prompts_without_those_that_are_new(base, old, files):
    write_lines(files / "replay.jsonl", [{"prompt": "new 1"}, {"prompt": "stay"}, {"prompt": HELD_OUT[0]}])
    assert train(base, old, files, "--replay", str(files / "replay.jsonl")) == 0
    rows = [json.loads(line) for line in (files / "run" / "prompts.jsonl").read_text().splitlines()]
    assert [r["messages"][0]["content"] for r in rows if r.get("privileged_context") == CONTEXT] == ["stay"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--replay", "1.5"], "share above 0"),
        (["--lora-rank", "4"], "drop lora_rank"),
        (["--teacher-model", "x"], "drop teacher_model"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(base, old, files, more, words, capsys):
    assert train(base, old, files, *more) == 2
    assert words in capsys.readouterr().err
    assert not (files / "run").exists()


def test_another_base_is_refused(base, old, files, tmp_path, capsys):
    other = save_base(tmp_path / "other", seed=1)
    assert train(other, old, files) == 2
    assert "its base is not that of --model" in capsys.readouterr().err


def test_replay_alone_and_replay_of_the_same_prompts(base, old, files, capsys):
    write_lines(files / "prompts.jsonl", [{"prompt": text} for text in TRAIN])
    assert train(base, old, files, "--replay", "0.5") == 2
    assert "among the new ones" in capsys.readouterr().err
    assert main(["train", "--model", str(base), "--prompts", str(files / "prompts.jsonl"), "--replay", "0.1"]) == 2
    assert "needs init" in capsys.readouterr().err

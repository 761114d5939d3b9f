"""`opcd train --init RUN --replay`: who starts where, and who teaches what."""

import json

import pytest
import torch
from loss_oracle import token_kl64
from report_runs import CONTEXT, HELD_OUT, TRAIN, make_run, save_base, write_lines

from opcd_fast.cli import main
from opcd_fast.data import read_prompts, teacher_ids
from opcd_fast.evaluation.report import ReportOptions, measure
from opcd_fast.models import load_model, load_tokenizer

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
    student, teacher = (load_model(folder, dtype="float32", device="cpu") for folder in (old / "final", base))
    tokenizer, kls = load_tokenizer(base), []
    for sample, prompt in zip(samples, read_prompts(HELD_OUT), strict=True):
        sides = []
        for model, shown in ((student, sample["student_prompt"]), (teacher, teacher_ids(tokenizer, prompt, NEW))):
            ids = torch.tensor([[*shown, *sample["response"]]])
            sides.append(model(ids).logits[0, len(shown) - 1 : -1].detach().double())
        kls.append(float(token_kl64(*sides).mean()))
    assert sum(kls) / len(kls) == pytest.approx(evaluation["fixed_kl"], rel=1e-3)


def prompts_of(run):
    """All rows that it trained on, and those that bring a context of their own."""
    rows = [json.loads(line) for line in (run / "prompts.jsonl").read_text().splitlines()]
    return rows, [row for row in rows if "privileged_context" in row]


def test_replayed_prompts_keep_the_old_context(base, old, files):
    assert train(base, old, files, "--replay", "0.5") == 0
    rows, replayed = prompts_of(files / "run")
    assert len(rows) == 8 and len(replayed) == 4
    assert {row["privileged_context"] for row in replayed} == {CONTEXT}
    assert {row["messages"][0]["content"] for row in replayed} < set(TRAIN)
    assert json.loads((files / "run" / "run.json").read_text())["init"]["replayed"] == 4


def test_a_file_of_replayed_prompts_without_those_that_are_new(base, old, files):
    write_lines(files / "replay.jsonl", [{"prompt": "new 1"}, {"prompt": "stay"}, {"prompt": HELD_OUT[0]}])
    assert train(base, old, files, "--replay", str(files / "replay.jsonl")) == 0
    assert [row["messages"][0]["content"] for row in prompts_of(files / "run")[1]] == ["stay"]


def test_the_column_of_the_prompts_is_that_of_the_replayed_ones(base, old, files):
    write_lines(files / "prompts.jsonl", [{"question": f"new {i}"} for i in range(4)])
    write_lines(files / "eval.jsonl", [{"question": text} for text in HELD_OUT])
    write_lines(files / "replay.jsonl", [{"question": "stay", "prompt": "no"}])
    assert train(base, old, files, "--replay", str(files / "replay.jsonl"), "--prompt-column", "question") == 0
    assert [row["messages"][0]["content"] for row in prompts_of(files / "run")[1]] == ["stay"]


def test_what_does_not_fit_is_refused_before_anything_is_written(base, old, files, tmp_path, capsys):
    other = save_base(tmp_path / "other", seed=1)
    write_lines(files / "again.jsonl", [{"prompt": text} for text in TRAIN])
    for model, more, words in (
        (base, ["--replay", "1.5"], "share above 0"),
        (base, ["--lora-rank", "4"], "drop lora_rank"),
        (base, ["--teacher-model", "x"], "drop teacher_model"),
        (other, [], "its base is not that of --model"),
        (base, ["--prompts", str(files / "again.jsonl"), "--replay", "0.5"], "among the new ones"),
    ):
        assert train(model, old, files, *more) == 2
        assert words in capsys.readouterr().err
    assert main(["train", "--model", "m", "--prompts", str(files / "prompts.jsonl"), "--replay", "0.1"]) == 2
    assert "needs init" in capsys.readouterr().err
    assert not (files / "run").exists()

"""`opcd prompts` from the command line: sources together, files that train, and mistakes in one line."""

import json
import random

import pytest
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.cli import main
from opcd_fast.contexts import asking
from opcd_fast.data import read_prompts
from opcd_fast.rollout import TransformersRollout


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def files(tmp_path):
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghij ", k=20)) for _ in range(40)]
    (tmp_path / "context.txt").write_text("always say zzz")
    (tmp_path / "logs.txt").write_text("\n".join(texts[:20]))
    rows = [f"{n},{text}" for n, text in enumerate(texts[15:])]
    (tmp_path / "data.csv").write_text("\n".join(["id,question", *rows]))
    return tmp_path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_logs_data_and_general_prompts_make_files_that_train(model_folder, files, capsys):
    out = files / "out"
    arguments = [
        "prompts", "--logs", str(files / "logs.txt"), "--data", str(files / "data.csv"), "--column", "question",
        "--general", "builtin", "--held-out", "0.25", "--model", model_folder, "--output-dir", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    train, held_out = rows_of(out / "train.jsonl"), rows_of(out / "held_out.jsonl")
    assert (len(train), len(held_out)) == (38, 10)  # 40 different questions, 8 general ones
    assert sum(row.get("privileged_context") == "" for row in train) == 8
    for words in ("30 training and 10 held-out", "8 general prompts", "5 repeated", "tokens"):
        assert words in said
    lengths = sorted(len(row["prompt"]) + 3 for row in (*train, *held_out))  # a byte a token, three of the template
    assert json.loads((out / "summary.json").read_text())["median_tokens"] == sum(lengths[23:25]) / 2
    before = (out / "train.jsonl").read_bytes()
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert (out / "train.jsonl").read_bytes() == before
    capsys.readouterr()
    arguments = [
        "train", "--model", model_folder, "--context", str(files / "context.txt"), "--lora-rank", "2", "--steps", "1",
        "--prompts", str(out / "train.jsonl"), "--eval-prompts", str(out / "held_out.jsonl"), "--batch-size", "4",
        "--max-new-tokens", "3", "--device", "cpu", "--output-dir", str(files / "run"),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "8 of 38 prompts have an empty privileged_context" in capsys.readouterr().out


def test_a_model_is_asked(model_folder, files, capsys, monkeypatch):
    """The answers of a random model are noise; the real question is answered by `test_asking` and by real models."""
    monkeypatch.setattr(asking, "ANSWER_TOKENS", 40)
    arguments = [
        "prompts", "--ask", "4", "--context", str(files / "context.txt"), "--model", model_folder, "--device", "cpu",
        "--held-out", "0.25", "--output-dir",
    ]  # fmt: skip
    assert main([*arguments, str(files / "a")]) == 0 and main([*arguments, str(files / "b")]) == 0
    assert ": 4 of 4 different prompts" in capsys.readouterr().out
    for name in ("train", "held_out"):
        assert (files / "a" / f"{name}.jsonl").read_bytes() == (files / "b" / f"{name}.jsonl").read_bytes()
    assert len(read_prompts(files / "a" / "train.jsonl")) == 3
    assert all(row["source"].startswith("asked, request") for row in rows_of(files / "a" / "train.jsonl"))
    assert main([*arguments, str(files / "c"), "--seed", "5"]) == 0
    assert (files / "c" / "train.jsonl").read_bytes() != (files / "a" / "train.jsonl").read_bytes()


def test_questions_of_the_context_are_left_out(files):
    (files / "turns.json").write_text(
        json.dumps([{"role": "user", "content": "Why is it so?"}, {"role": "assistant", "content": "x"}])
    )
    (files / "logs.txt").write_text("why is it so\nhow does it go\nwhere has it been\n")
    arguments = ["--context", str(files / "turns.json"), "--logs", str(files / "logs.txt"), "--held-out", "0"]
    assert main(["prompts", *arguments, "--output-dir", str(files / "out")]) == 0
    assert [row["prompt"] for row in rows_of(files / "out" / "train.jsonl")] == ["how does it go", "where has it been"]
    assert not (files / "out" / "held_out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no source"), (["--ask", "5"], "--ask needs --context and --model"),
        (["--ask", "0", "--context", "c", "--model", "m"], "ask=0"), (["--logs", "none.txt"], "does not exist"),
        (["--logs", "LOGS", "--column", "x"], "column"), (["--logs", "LOGS", "--max-tokens", "9"], "max_tokens"),
        (["--logs", "LOGS", "--general-share", "0.1"], "general_share"),
        (["--logs", "LOGS", "--temperature", "0.5"], "temperature"), (["--data", "LOGS", "--turns", "every"], "turns"),
        (["--logs", "LOGS", "--chat-template-kwargs", "{}"], "chat_template_kwargs"),
        (["--logs", "LOGS", "--held-out", "1"], "held_out=1"),
        (["--logs", "LOGS", "--general", "none.jsonl"], "none.jsonl"),
        (["--logs", "LOGS", "--min-characters", "99"], "no prompt is left"),
        (["--logs", "LOGS", "--context", "missing.txt"], "missing.txt"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(files, capsys, arguments, words):
    arguments = [str(files / "logs.txt") if word == "LOGS" else word for word in arguments]
    assert main(["prompts", *arguments, "--output-dir", str(files / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("opcd: ") and error.count("\n") == 1 and words in error
    assert not (files / "out").exists()


def test_a_failure_while_asking_leaves_nothing(model_folder, files, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the device is gone")

    arguments = ["--ask", "4", "--context", str(files / "context.txt"), "--model", model_folder, "--device", "cpu"]
    arguments = ["prompts", *arguments, "--output-dir", str(files / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(TransformersRollout, "generate", fail)
        assert main(arguments) == 2
    assert "the device is gone" in capsys.readouterr().err
    (files / "context.txt").write_text("x" * 3000)
    assert main(arguments) == 2
    assert "exceeds the model's window" in capsys.readouterr().err and not (files / "out").exists()

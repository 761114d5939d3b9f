"""A newcomer's own context and prompts, with no option but these."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from opcd_fast import OPCDConfig
from opcd_fast.cli import main
from opcd_fast.commands import COMMANDS
from opcd_fast.commands.train import TrainCommand
from opcd_fast.data import hold_out, read_prompts
from opcd_fast.errors import pip_install
from opcd_fast.runtime import printable
from opcd_fast.training.settings import option_names


@pytest.fixture
def job(tmp_path, model_folder):
    (tmp_path / "context.txt").write_text("always say zzz\n")
    (tmp_path / "prompts.txt").write_text("".join(f"question {i}\n" for i in range(30)))
    return [
        "--model", model_folder, "--context", str(tmp_path / "context.txt"), "--prompts", str(tmp_path / "prompts.txt"),
        "--output-dir", str(tmp_path / "run"), "--device", "cpu", "--no-plots",
    ]  # fmt: skip


def settings(folder):
    return json.loads((folder / "run" / "config.json").read_text())


SHORT = ("--steps", "1", "--max-new-tokens", "4")


def test_a_run_with_nothing_but_its_files(job, tmp_path, capsys):
    assert main(["train", *job, "--max-new-tokens", "4"]) == 0
    found, out = settings(tmp_path), capsys.readouterr().out
    assert (found["lora_rank"], found["batch_size"], found["steps"]) == (16, 16, 20)
    assert "8 of 30 prompts are held out" in out and "LoRA of rank 16: 20 steps of 16 prompts" in out
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["kind"] == "evaluation"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["context"] == "always say zzz"


def test_what_is_named_stays_as_it_is(job, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("batch_size: 3\n")
    named = ["--config", str(tmp_path / "run.yaml"), "--lora-rank", "0", *SHORT]
    assert main(["train", *job, *named, "--eval-prompts", "none"]) == 0
    found = settings(tmp_path)
    assert (found["lora_rank"], found["batch_size"], found["steps"], found["max_new_tokens"]) == (0, 3, 1, 4)
    assert "held out" not in capsys.readouterr().out
    assert len((tmp_path / "run" / "prompts.jsonl").read_text().splitlines()) == 30


def test_the_papers_settings(job, tmp_path):
    assert main(["train", *job, "--preset", "paper", *SHORT, "--batch-size", "2"]) == 0
    found = settings(tmp_path)
    assert (found["lora_rank"], found["batch_size"]) == (0, 2)


def test_settings_are_checked_together_with_the_presets(job, capsys):
    """The rank and the number of steps that these need are the preset's."""
    needs = ["--use-dora", "--lora-alpha", "64", "--merge-for-rollout", "True", "--warmup-steps", "60",
             "--batch-size", "1"]  # fmt: skip
    assert main(["preview", *job, *needs, "--max-new-tokens", "4"]) in (0, 1)
    for wrong, told in ((["--lora-rank", "0"], "lora_alpha"), (["--steps", "60"], "warmup_steps"),
                        (["--preset", "paper"], "lora_rank")):  # fmt: skip
        assert main(["train", *job, *needs, *wrong]) == 2 and told in capsys.readouterr().err


def test_another_preset_is_refused(job, capsys):
    assert main(["train", *job, "--preset", "papers"]) == 2
    assert "preset='papers'" in capsys.readouterr().err


def test_a_run_that_goes_on_holds_out_what_it_did(job, tmp_path, capsys):
    assert main(["train", *job, *SHORT]) == 0
    longer = ["train", *job, "--max-new-tokens", "4", "--steps", "2", "--resume"]
    assert main(longer) == 0 and "nothing is left to do" not in capsys.readouterr().out
    assert main(longer) == 0 and "2 steps are made already: nothing is left to do" in capsys.readouterr().out
    assert main(["train", *job, *SHORT, "--eval-prompts", "none", "--output-dir", str(tmp_path / "b")]) == 0
    assert main(["train", *job, *SHORT, "--output-dir", str(tmp_path / "b"), "--steps", "2", "--resume"]) == 0
    assert "held out for evaluation" not in capsys.readouterr().out  # where it goes on neither


def test_which_prompts_are_held_out():
    texts = [f"question {i % 90}" for i in range(100)]
    rows = [*({"prompt": text} for text in texts), {"prompt": "a guard", "privileged_context": ""}]
    train, held_out = hold_out(read_prompts(rows))
    asked = [{prompt.messages[0]["content"] for prompt in side} for side in (train, held_out)]
    assert len(train) + len(held_out) == 101 and len(asked[1]) == 9 and not asked[0] & asked[1]
    assert "a guard" in asked[0]
    assert hold_out(read_prompts(rows)) == (train, held_out)
    assert [len(side) for side in hold_out(read_prompts(rows[:23]))] == [23, 0]
    assert [len(side) for side in hold_out(read_prompts(rows[:24]))] == [16, 8]


def test_preview_writes_nothing_and_says_whether_there_is_something_to_learn(job, tmp_path, capsys):
    status = main(["preview", *job, "--max-new-tokens", "4"])
    out = capsys.readouterr().out
    assert status == int("The context changes the answers" not in out) and out.count("base + context  ") == 3
    assert not (tmp_path / "run").exists()


def test_generate_takes_a_runs_folder_and_standard_input(job, tmp_path, capsys, monkeypatch):
    assert main(["train", *job, *SHORT]) == 0
    ask = ["--max-new-tokens", "3", "--dtype", "float32", "--device", "cpu"]
    capsys.readouterr()
    for name in ("run", "run/final"):
        assert main(["generate", "--model", str(tmp_path / name), "--prompt", "question 1", *ask]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    monkeypatch.setattr("sys.stdin", io.StringIO("question 1\n\nquestion 2\n"))
    assert main(["generate", "--model", str(tmp_path / "run"), "--prompts", "-", *ask]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["question 1", "question 2"] and lines[0]["answer"] == first
    (tmp_path / "run" / "final").rename(tmp_path / "run" / "gone")
    assert main(["generate", "--model", str(tmp_path / "run"), "--prompt", "q", *ask]) == 2
    assert "has not ended" in capsys.readouterr().err


def test_a_trained_prefix_takes_its_part_of_the_window(job, tmp_path, capsys, monkeypatch):
    assert main(["train", *job, *SHORT, "--num-virtual-tokens", "3", "--eval-prompts", "none"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("question 1\nquestion 1\n"))
    ask = ["--model", str(tmp_path / "run"), "--device", "cpu", "--max-new-tokens"]
    assert main(["generate", "--prompt", "question 1", *ask, "512"]) == 2
    room = 512 - int(capsys.readouterr().err.split("prompt of ")[1].split()[0])
    for command in (["generate", "--prompt", "question 1"], ["chat"]):
        assert main([*command, *ask, str(room)]) == 2 and "by 3;" in capsys.readouterr().err


def test_chat_keeps_two_conversations(job, tmp_path, capsys, monkeypatch):
    assert main(["train", *job, *SHORT]) == 0
    ask = ["--max-new-tokens", "3", "--temperature", "0", "--dtype", "float32", "--device", "cpu"]
    run, context = str(tmp_path / "run"), str(tmp_path / "context.txt")
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\ntwo\n"))
    assert main(["chat", "--model", run, "--context", context, *ask]) == 0
    spoken = [line.lstrip("> ") for line in capsys.readouterr().out.split("\n")]
    student, base = (
        [line.partition(": ")[2] for line in spoken if line.startswith(f"{speaker}:")]
        for speaker in ("student", "base + context")
    )
    assert len(student) == len(base) == 3

    def answer(model, asked, *more):
        (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": asked}))
        assert main(["generate", "--model", model, "--prompts", str(tmp_path / "asked.jsonl"), *ask, *more]) == 0
        return json.loads(capsys.readouterr().out)["answer"]

    turn = {"role": "user", "content": "two"}
    for spoke, model, more in ((student, run, ()), (base, job[1], ("--context", context))):
        first = answer(model, "one", *more)
        later = [{"role": "user", "content": "one"}, {"role": "assistant", "content": first}, turn]
        wanted = [first, answer(model, later, *more), answer(model, "two", *more)]
        assert spoke == [printable(text).strip() for text in wanted]  # no character that the terminal would obey
    assert main(["chat", "--model", job[1], "--context", context, *ask]) == 2
    assert "no adapter" in capsys.readouterr().err


def said(capsys, *words):
    try:
        status = main(list(words))
    except SystemExit as stop:
        status = stop.code or 0
    out = capsys.readouterr()
    return status, out.out, out.err.strip()


def test_help_fits_one_screen_and_the_rest_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    short, whole = (said(capsys, *words)[1] for words in (("train", "--help"), ("train", "--help-all")))
    assert short == said(capsys, "help", "train")[1] == said(capsys, "train", "-h")[1]
    assert len(short.splitlines()) <= 30 and short.count("\n  --") == 10
    names = [name for name in option_names(TrainCommand, OPCDConfig) if name != "run"]
    assert all(f"\n  --{name.replace('_', '-')}" in whole for name in names)
    for name in set(COMMANDS) - {"completion"}:
        status, text, _ = said(capsys, name, "--help")
        assert status == 0 and "{None}" not in text and text, name
    assert said(capsys, "-V") == said(capsys, "--version") and said(capsys, "help")[1] == said(capsys)[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lora-rnak 3", "there is no option --lora-rnak; did you mean --lora-rank?"),
        ("--lora_rnak=3", "there is no option --lora-rnak; did you mean --lora-rank?"),
        ("--learning-rate abc", "--learning-rate abc must be a number"),
        ("--steps=many", "--steps many must be a whole number"),
        ("--batch-size", "--batch-size needs a value"),
        ("--save-best maybe", "maybe belongs to no option"),
    ],
)
def test_a_slip_in_the_options(job, capsys, words, told):
    for command in ("train", "preview"):
        status, out, err = said(capsys, command, *job, *words.split())
        assert status == 2 and not out and f"opcd: {command}: {told}" in err and len(err.splitlines()) == 1


def test_what_must_be_given(capsys):
    assert said(capsys, "generate", "--prompt", "x")[2].startswith("opcd: generate: --model must be given")
    for words, missing in (("report", "RUN"), ("check --context x", "RUN"), ("diff", "A and B"), ("diff a", "B")):
        name, told = words.split()[0], said(capsys, *words.split())[2]
        assert told.startswith(f"opcd: {name}: {missing} must be given")
    assert said(capsys, "diff", "--modle", "x")[2].startswith("opcd: diff: there is no option --modle")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(capsys, shell, tmp_path):
    status, script, _ = said(capsys, "completion", shell)
    assert status == 0 and "lora" in script and all(name in script for name in COMMANDS)
    if shell == "bash":
        ask = 'COMP_WORDS=(opcd train --lora-r); COMP_CWORD=2; _opcd; echo "${COMPREPLY[*]}"; COMP_WORDS=(opcd pre); '
        ask += 'COMP_CWORD=1; _opcd; echo "${COMPREPLY[*]}"'
        done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["--lora-rank", "preview"]
    assert said(capsys, "completion", "csh")[0] == 2


def test_an_error_names_each_thing_once(capsys, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    for words, told in (
        (("generate", "--model", "m", "--prompt", " "), "prompt is empty"),
        (("train", "--model", "m", "--context", __file__, "--task", "math:none.jsonl"), "opcd: math file '"),
        (("train", "--model", "m", "--context", __file__, "--prompts", str(tmp_path / "p.jsonl")),
         "line 2 is not valid JSON: Expecting ',' delimiter at character 15"),
    ):  # fmt: skip
        status, _, err = said(capsys, *words)
        assert status == 2 and told in err and " line 1 column " not in err and "file file" not in err


@pytest.mark.parametrize("option", ["--context", "--prompts", "--eval-prompts"])
def test_a_missing_file_is_told_before_torch_is_imported(tmp_path, option):
    (tmp_path / "there.txt").write_text("a\n")
    files = dict.fromkeys(("--context", "--prompts", "--eval-prompts"), "there.txt") | {option: "none.txt"}
    words = ["train", "--model", "m", *(word for pair in files.items() for word in pair)]
    code = f"import sys; from opcd_fast.cli import main; status = main({words}); print(status, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.split() == ["2", "False"] and "'none.txt' does not exist" in done.stderr


@pytest.mark.parametrize(
    ("recorded", "wanted"),
    [
        (None, "pip install 'opcd-fast[train]'"),
        ({"url": "https://example.org/x.whl", "archive_info": {}}, "pip install 'opcd-fast[train]'"),
        ({"url": "file:///a/my%20folder", "dir_info": {}}, "pip install --no-build-isolation '/a/my folder[train]'"),
        ({"url": "file:///a", "dir_info": {"editable": True}}, "pip install --no-build-isolation -e '/a[train]'"),
    ],
)
def test_an_extra_is_added_as_the_package_was_installed(monkeypatch, recorded, wanted):
    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return recorded and json.dumps(recorded)

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed())
    assert pip_install.__wrapped__("train") == wanted

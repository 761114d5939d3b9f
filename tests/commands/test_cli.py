"""The command line: every mistake is one line and status 2, and nothing is left half-written."""

import json
import os
import subprocess
import sys

import pytest

from opcd_fast.cli import main
from opcd_fast.commands import COMMANDS, info
from opcd_fast.commands.train import train_command
from opcd_fast.errors import InputError


@pytest.fixture
def files(tmp_path):
    (tmp_path / "context.txt").write_text("always say zzz")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(4)))
    return tmp_path


def train_arguments(model, files, *more):
    return [
        "train", "--model", model, "--context", str(files / "context.txt"), "--prompts", str(files / "prompts.jsonl"),
        "--output-dir", str(files / "run"), "--steps", "2", "--batch-size", "2", "--max-new-tokens", "4",
        "--lora-rank", "2", "--device", "cpu", *more,
    ]  # fmt: skip


def test_help_is_there_without_torch():
    code = "import sys; from opcd_fast.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  opcd ")][:-1] == list(COMMANDS)
    same = subprocess.run([sys.executable, "-m", "opcd_fast"], capture_output=True, text=True, timeout=120)
    assert same.stdout == done.stdout


def test_train_then_generate_then_resume(model_folder, files, capsys):
    assert main(train_arguments(model_folder, files)) == 0
    assert (files / "run" / "final" / "adapter_config.json").is_file()
    out = capsys.readouterr().out
    assert "step 2/2" in out and "tokens/s" in out
    generate = ["generate", "--model", str(files / "run" / "final"), "--prompt", "q1", "--max-new-tokens", "5"]
    assert main(generate) == 0
    assert main([*generate, "--context", str(files / "context.txt"), "--temperature", "0.5"]) == 0
    assert main(train_arguments(model_folder, files)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(train_arguments(model_folder, files, "--resume", "--steps", "3")) == 0
    lines = (files / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_yaml_and_command_line_are_checked_together(model_folder, files):
    """lora_alpha and merge_for_rollout need the rank of the command line; a rank of 0 there is the last word."""
    (files / "run.yaml").write_text(
        "lora_alpha: 8\nmerge_for_rollout: true\nlora_targets: [q_proj, v_proj]\nstop_tokens: ['z', '--']\n"
        "micro_batch_tokens: null\ngradient_checkpointing: true\ndevice: cpu\nsteps: 9\ntemperature: 1\n"
        "max_grad_norm: 1e-1\n"
    )

    def parse(*more):
        command, _ = train_command(["--model", "M", "--prompts", "P", "--config", str(files / "run.yaml"), *more])
        return command, command.run.checked()

    config = parse("--lora-rank", "4", "--steps", "1", "--no-gradient-checkpointing")[1]
    assert (config.lora_alpha, config.merge_for_rollout, config.lora_targets) == (8, True, "q_proj,v_proj")
    assert (config.stop_tokens, config.micro_batch_tokens, config.steps) == (("z", "--"), None, 1)
    assert (config.gradient_checkpointing, config.max_grad_norm, config.device) == (False, 0.1, "cpu")
    assert parse("--lora-rank", "4", "--stop-tokens")[1].stop_tokens == ()
    with pytest.raises(InputError, match="lora_alpha is set, but lora_rank=0"):
        parse()
    (files / "run.yaml").write_text("lora-rank: 4\nlora_alpha: 8\nlearning_rate: 1e-4\nteacher_model: T\n")
    assert parse("--lora-rank", "0", "--lora-alpha", "None")[1].lora_alpha is None
    assert parse()[0].teacher_model == "T" and parse()[1].learning_rate == 1e-4 and parse()[1].lora_rank == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run: {steps: 3}", "unknown option 'run'"),
        ("model: 5", "model=5"),
        ("resume: 'false'", "resume='false'"),
        ("stop_tokens: abc", "stop_tokens='abc'"),
        ("learning_rate: .nan", "learning_rate=nan"),
        ("steps:", "steps=None"),
    ],
)
def test_a_bad_yaml_value_is_one_line(files, capsys, line, words):
    (files / "run.yaml").write_text(line + "\n")
    model = [] if line.startswith("model") else ["--model", "M"]
    assert main(["train", "--config", str(files / "run.yaml"), "--prompts", "none.jsonl", *model]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "did you mean 'train'"),
        (["train"], "--model"),
        (["train", "--model", "M", "--prompts", "P", "--stepz", "3"], "--stepz"),
        (["train", "--model", "M", "--prompts", "P", "--steps", "many"], "steps"),
        (["train", "--model", "M", "--prompts", "P", "--batch-size", "0"], "batch_size=0"),
        (["train", "--model", "M", "--prompts", "none.jsonl"], "does not exist"),
        (["train", "--config", "none.yaml"], "does not exist"),
        (["generate", "--model", "/no/such/folder", "--prompt", "x"], "does not exist"),
        (["generate", "--model", "smollm2", "--prompt", "x", "--context", "nothing here"], "does not exist"),
        (["generate", "--model", "smollm2", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["demo", "--steps", "0"], "steps=0 must be at least 1"),
        (["demo", "--seed", "-1"], "seed=-1"),
        (["generate", "--model", "M", "--prompt", "x", "--seed", str(2**63)], f"seed={2**63}"),
        (["generate", "--model", "M", "--prompt", "x", "--temperature", "nan"], "temperature=nan"),
        (["generate", "--model", "M", "--prompt", "x", "--top-p", "nan"], "top_p=nan"),
        (["info", "--all"], "'--all'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("opcd: ") and error.count("\n") == 1 and words in error


def test_mistakes_found_after_loading_write_nothing(model_folder, files, capsys):
    (files / "context.txt").write_text("x" * 700)
    assert main(train_arguments(model_folder, files)) == 2
    assert "window of 512" in capsys.readouterr().err
    assert not (files / "run").exists()
    (files / "run").write_text("a file, not a folder")
    assert main(train_arguments(model_folder, files)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["generate", "--model", model_folder, "--prompt", "y" * 600]) == 2
    assert "exceeds the model's window" in capsys.readouterr().err


def test_a_teacher_of_its_own_and_one_that_follows(model_folder, files):
    own = ["--teacher-device", "cpu", "--teacher-model", model_folder]
    assert main(train_arguments(model_folder, files, *own)) == 0
    assert json.loads((files / "run" / "config.json").read_text())["teacher_device"] == "cpu"
    assert not list((files / "run").glob("checkpoints/*/teacher.safetensors"))
    follows = ["--teacher-mode", "ema", "--teacher-ema-decay", "0.5", "--output-dir", str(files / "average")]
    assert main(train_arguments(model_folder, files, *follows)) == 0
    assert len(list((files / "average").glob("checkpoints/*/teacher.safetensors"))) == 1


def test_generate_ends_at_a_stop_token(model_folder, capsys):
    arguments = ["generate", "--model", model_folder, "--prompt", "q1", "--max-new-tokens", "24", "--temperature", "1"]
    arguments += ["--seed", "3"]  # an answer with a printable letter in it
    assert main(arguments) == 0
    answer = capsys.readouterr().out.strip("\n")
    letter = next(c for c in answer if c.isascii() and c.isprintable() and c != " ")
    assert main([*arguments, "--stop-tokens", letter]) == 0
    assert capsys.readouterr().out.strip("\n") == answer[: answer.index(letter) + 1] != answer
    assert main([*arguments, "--stop-tokens", "no such token"]) == 2
    assert "stop_tokens" in capsys.readouterr().err


BLOCKED = """
import sys
for name in {names!r}:
    sys.modules[name] = None  # as if it were not installed
from opcd_fast.cli import main
sys.exit(main({arguments!r}))
"""
OPTIONAL = ("tyro", "transformers", "peft", "accelerate", "safetensors", "yaml", "rich", "matplotlib", "gguf", "trl")


def without(names, *arguments):
    code = BLOCKED.format(names=names, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_info_works_without_any_optional_package():
    done = without((*OPTIONAL, "triton"), "info")
    assert done.returncode == 0, done.stderr
    for word in ("opcd-fast", "torch", "triton", "transformers", "CPU library", "missing"):
        assert word in done.stdout
    assert "usage: opcd info" in without(OPTIONAL, "info", "--help").stdout


@pytest.mark.parametrize(
    ("names", "arguments", "words"),
    [
        (("tyro",), ("train", "--help"), "'tyro' is missing: pip install"),
        (("transformers",), ("generate", "--model", "M", "--prompt", "x"), "'transformers' is missing"),
        (("yaml",), ("train", "--config", "x.yaml"), "'yaml' is missing"),
        (("matplotlib",), ("demo", "--output-dir", "/dev/null/never"), "'matplotlib' is missing"),
    ],
)
def test_a_missing_package_is_one_line(names, arguments, words):
    done = without(names, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("opcd: ") and done.stderr.count("\n") == 1 and words in done.stderr


def failing(error):
    def command(arguments):
        raise error

    return command


def test_failures_of_libraries_are_one_line(monkeypatch, capsys):
    import safetensors
    import torch

    monkeypatch.delenv("OPCD_DEBUG", raising=False)
    for error in (ValueError("bad\nmore"), OSError("bad"), RuntimeError("bad"), safetensors.SafetensorError("bad")):
        monkeypatch.setattr(info, "run", failing(error))
        assert main(["info"]) == 2
        assert capsys.readouterr().err == "opcd: bad (OPCD_DEBUG=1 shows where)\n"
    monkeypatch.setattr(info, "run", failing(torch.OutOfMemoryError("CUDA out of memory.\nTried")))
    assert main(["info"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "micro_batch_tokens" in error and "rollout_batch" in error
    monkeypatch.setenv("OPCD_DEBUG", "1")
    for error in (InputError("bad"), OSError("bad")):
        monkeypatch.setattr(info, "run", failing(error))
        with pytest.raises(type(error)):
            main(["info"])


@pytest.mark.parametrize("kind", [KeyError, AttributeError, TypeError, AssertionError, NotImplementedError])
def test_bugs_keep_their_traceback(monkeypatch, kind):
    monkeypatch.delenv("OPCD_DEBUG", raising=False)
    monkeypatch.setattr(info, "run", failing(kind("bug")))
    with pytest.raises(kind):
        main(["info"])


def test_no_box_in_a_terminal_that_is_not_utf8():
    code = "import sys; from opcd_fast.cli import main; sys.exit(main(['train', '--model', 'M', '--stepz', '3']))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and "--stepz" in done.stderr and "---" not in done.stderr, done.stderr


def test_the_demo_replaces_nothing_but_a_demo(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["demo", "--output-dir", str(tmp_path)]) == 2
    assert "not a demo's" in capsys.readouterr().err
    assert main(["demo", "--output-dir", str(tmp_path / "mine.txt")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep me"

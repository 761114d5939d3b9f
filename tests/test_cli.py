"""The command line: every mistake is one line and status 2, and nothing is left half-written."""

import json
import subprocess
import sys

import pytest
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.cli import main


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


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
    for word in ("demo", "train", "generate", "info"):
        assert f"opcd {word}" in done.stdout


def test_every_option_of_the_config_is_an_option_of_train(capsys):
    from opcd_fast.config import OPCDConfig, option_names

    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for name in option_names(OPCDConfig):
        assert "--" + name.replace("_", "-") in text


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


def test_yaml_and_command_line_agree_and_the_command_line_wins(model_folder, files):
    (files / "run.yaml").write_text(
        f"model: {model_folder}\ncontext: {files / 'context.txt'}\nprompts: {files / 'prompts.jsonl'}\n"
        f"output_dir: {files / 'from_yaml'}\nsteps: 9\nbatch-size: 2\nmax_new_tokens: 4\nlora_rank: 2\n"
        "learning_rate: 1e-4\ndevice: cpu\n"
    )
    assert main(["train", "--config", str(files / "run.yaml"), "--steps", "1"]) == 0
    saved = json.loads((files / "from_yaml" / "config.json").read_text())
    assert (saved["steps"], saved["batch_size"], saved["learning_rate"]) == (1, 2, 1e-4)


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
        (["train", "--config"], "needs a file"),
        (["generate", "--model", "/no/such/folder", "--prompt", "x"], "does not exist"),
        (["generate", "--model", "smollm2", "--prompt", "x", "--context", "nothing here"], "does not exist"),
        (["generate", "--model", "smollm2", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["demo", "--samples", "0"], "samples"),
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
    assert main(["generate", "--model", model_folder, "--prompt", "y" * 600]) == 2
    assert "exceeds the model's window" in capsys.readouterr().err


def test_a_teacher_with_another_tokenizer_is_refused(model_folder, files, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("other")
    tiny_model(vocab_size=262).save_pretrained(folder)
    other = tiny_tokenizer()
    other.add_tokens(["hello"])
    other.save_pretrained(folder)
    arguments = train_arguments(model_folder, files, "--teacher-model", str(folder), "--lora-rank", "0")
    assert main(arguments) == 2
    assert "different tokenizers" in capsys.readouterr().err
    assert not (files / "run").exists()


def test_info_names_what_is_there(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("opcd-fast", "torch", "triton", "transformers", "CPU library"):
        assert word in out


def test_unwritable_output_is_one_line(model_folder, files, capsys):
    (files / "run").write_text("a file, not a folder")
    assert main(train_arguments(model_folder, files)) == 2
    assert capsys.readouterr().err.count("\n") == 1

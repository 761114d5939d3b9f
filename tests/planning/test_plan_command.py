"""`opcd plan`: what it prints, and its exit status."""

import json
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.cli import main
from opcd_fast.commands.plan import plan_command
from opcd_fast.commands.train import train_command
from opcd_fast.errors import InputError
from opcd_fast.planning import gpu_bytes

KEYS = 3 * 2 * 2 * 24 * 2  # bytes of a token: layers, keys and values, heads, head size, bf16
SETTINGS = ["--context-tokens", "100", "--prompt-tokens", "20", "--batch-size", "4", "--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without weights."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(hidden_size=96, num_hidden_layers=3).config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def as_plan(capsys, *arguments, status=0):
    assert main(["plan", "--json", *map(str, arguments)]) == status, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_parts_add_up_to_phases_and_the_worst_phase_is_the_peak(folder, capsys):
    plan = as_plan(capsys, "--model", folder, "--gpu", "24GB", *SETTINGS, "--lora-rank", 4)
    assert plan["fits"] and plan["settings"] == {} and plan["teacher_path"] == "merge"
    assert plan["peak_bytes"] == plan["phases"][plan["peak_phase"]]["bytes"]
    assert plan["peak_bytes"] == max(phase["bytes"] for phase in plan["phases"].values())
    for phase in plan["phases"].values():
        assert phase["bytes"] == sum(phase["parts"].values())


def test_does_not_fit_and_says_by_how_much(folder, capsys):
    assert main(["plan", "--model", folder, "--gpu", "770MB", *SETTINGS, "--no-search", "--preset", "paper"]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "lora_rank=16" in out


def test_settings_that_were_found_fit(folder, capsys):
    arguments = ["--model", folder, "--device", "cpu", *SETTINGS, "--batch-size", 64, "--lora-rank", 4]
    free = as_plan(capsys, *arguments, "--gpu", "1GB")["peak_bytes"]
    half = ["--gpu", f"{free / 2**20 / 2}MB"]
    plan = as_plan(capsys, *arguments, *half)
    assert plan["peak_bytes"] <= free / 2 and plan["settings"]
    # What it prints are settings: without a search they are found to fit as well.
    options = [word for name, value in plan["settings"].items()
               for word in (f"--{name.replace('_', '-')}", *(() if value is True else (value,)))]  # fmt: skip
    assert as_plan(capsys, *arguments, *options, *half, "--no-search")["fits"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "24 apples"], "gpu='24 apples'"),
        (["--gpu", "100MB"], "less than"),
        (["--gpu", "1GB", "--context", "x.txt"], "not both"),
        (["--gpu", "1GB", "--eval-prompts", "p.jsonl"], "give context"),
        (["--gpu", "1GB", "--lora-alpha", "3", "--lora-rank", "0"], "lora_alpha is set"),
    ],
)
def test_wrong_usage(folder, capsys, arguments, words):
    assert main(["plan", "--model", folder, *SETTINGS, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_a_context_one_of_a_usual_length_is_planned(folder, capsys, monkeypatch):
    """The result is the same as with the number given, and stands alone on standard output."""
    monkeypatch.setattr("opcd_fast.commands.plan.CONTEXT_TOKENS", 100)  # what this model's window holds
    printed = []
    for settings in (SETTINGS, SETTINGS[2:]):
        assert main(["plan", "--model", folder, "--gpu", "24GB", "--json", *settings]) == 0
        out, told = capsys.readouterr()
        printed.append(json.loads(out))
        assert ("100 tokens" in told) == (settings is not SETTINGS) and "rehearsing" in told
    assert printed[0] == printed[1]


def test_lengths_come_from_files_and_rows_may_bring_their_contexts(tmp_path, folder, capsys):
    (tmp_path / "c.txt").write_text("be brief " * 40)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": "q" * n}) + "\n" for n in (5, 50)))
    rows = [{"prompt": "q" * 9, "privileged_context": letter * 40} for letter in "ab"]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", folder, "--gpu", "24GB", "--batch-size", 2, "--max-new-tokens", 16, "--prompts"]
    plan = as_plan(capsys, *common, tmp_path / "p.jsonl", "--context", tmp_path / "c.txt")
    # Both prompts, with the template's tokens: more than their letters, less than with the context.
    assert 2 * (5 + 50) + 4 * 15 <= plan["micro_batch_tokens"] < 2 * (5 + 50) + 4 * 15 + 40
    assert 360 * KEYS <= plan["phases"]["student"]["parts"]["context KV"] < 400 * KEYS
    plan = as_plan(capsys, *common, tmp_path / "own.jsonl")
    assert 2 * 40 * KEYS <= plan["phases"]["student"]["parts"]["context KV"] < 2 * 80 * KEYS
    assert main(["plan", *map(str, common), str(tmp_path / "p.jsonl")]) == 2
    assert "context is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--prompt-tokens", "500"], "prompt of 500 tokens plus max_new_tokens=16 exceeds the model's window of 512"),
        (["--prompt-tokens", "490", "--num-virtual-tokens", "10"], "prompt of 500 tokens plus max_new_tokens=16"),
        (["--context-tokens", "480"], "exceed the teacher's window of 512 by 4"),
    ],
)
def test_what_no_window_holds_is_refused_as_by_a_run(folder, capsys, settings, words):
    assert main(["plan", "--model", folder, "--gpu", "24GB", *SETTINGS, *settings]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def written(tmp_path, folder):
    """The YAML file of a run, and what it says."""
    (tmp_path / "c.txt").write_text("be brief " * 30)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "q" * 30}) + "\n")
    (tmp_path / "e.jsonl").write_text(json.dumps({"prompt": "other"}) + "\n")
    settings = {
        "model": folder, "prompts": str(tmp_path / "p.jsonl"), "context": str(tmp_path / "c.txt"),
        "eval_prompts": str(tmp_path / "e.jsonl"), "lora_rank": 4, "batch-size": 2, "max_new_tokens": 16,
        "learning_rate": "1e-4", "rollout_batch": 2,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    return tmp_path / "run.yaml", settings


def test_the_file_of_a_run_is_planned_as_written(written, capsys):
    file, _ = written
    assert plan_command(["--config", str(file), "--gpu", "1GB"])[0].run == train_command(["--config", str(file)])[0].run
    found = as_plan(capsys, "--gpu", "24GB", "--config", file)
    assert found["phases"]["backward"]["parts"]["adapter"] and "evaluation" in found["phases"]
    more = as_plan(capsys, "--gpu", "24GB", "--config", file, "--batch-size", 6)
    assert more["micro_batch_tokens"] == 3 * found["micro_batch_tokens"]
    numbers = as_plan(capsys, "--gpu", "24GB", "--config", file, "--context-tokens", 300, "--prompt-tokens", 20)
    assert "evaluation" in numbers["phases"]
    assert numbers["phases"]["student"]["parts"]["context KV"] == 300 * KEYS


def test_the_evaluation_that_a_run_makes_is_planned(written, capsys):
    """Of prompts that `opcd train` would hold out, or of as many as one takes where there are only numbers."""
    file, settings = written
    lines = [f"{name}: {value}\n" for name, value in settings.items() if name != "eval_prompts"]
    Path(settings["prompts"]).write_text("".join(json.dumps({"prompt": f"{n} " + "q" * 30}) + "\n" for n in range(24)))
    bare = [line for line in lines if not line.startswith("prompts")]
    planned, none = ["--gpu", "24GB", "--no-search", "--prompt-tokens", 20, "--config", file], "eval_prompts: none\n"
    for names, more in ((lines, []), (bare, []), ([*lines, none], []), ([*lines, none], ["--context-tokens", 100])):
        file.write_text("".join(names))
        phases = as_plan(capsys, *planned, "--eval-batch", 2, *more)["phases"]
        assert ("evaluation" in phases) == (none not in names)


def test_the_turns_of_a_task_are_planned(written, capsys):
    pytest.importorskip("gymnasium")
    file, settings = written
    Path(settings["context"]).write_text("be brief")
    lines = [f"{name}: {value}\n" for name, value in settings.items() if name not in ("prompts", "eval_prompts")]
    file.write_text("".join(lines) + "task: frozen-lake-gymnasium\ntask_options: '{\"max_turns\": 4}'\n")
    found = as_plan(capsys, "--gpu", "24GB", "--config", file)
    assert any("4 turns" in note for note in found["notes"]) and "evaluation rollout" in found["phases"]
    one = as_plan(capsys, "--gpu", "24GB", "--config", file, "--task-options", '{"max_turns": 1}')
    # Later turns tell what the last move did.
    assert 4 * one["micro_batch_tokens"] < found["micro_batch_tokens"] < 6 * one["micro_batch_tokens"]
    status = main(["plan", "--gpu", "24GB", "--config", str(file), "--context-tokens", "300"])
    assert status == 2 and "give context" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("init: runs/before", "init goes on from an earlier run"),
        ("task: frozen-lake", "give --prompts FILE, or --task NAME in its place"),
        ("gpu: 24GB", "unknown option 'gpu'"),
    ],
)
def test_a_file_that_cannot_be_planned(written, capsys, line, words):
    file, _ = written
    file.write_text(file.read_text() + line + "\n")
    assert main(["plan", "--config", str(file), "--gpu", "24GB"]) == 2
    assert words in capsys.readouterr().err


def test_sizes_of_memory():
    assert gpu_bytes("24GB") == gpu_bytes("24 GiB") == gpu_bytes("24g") == 24 * 2**30
    assert gpu_bytes("1.5GB") == 3 * 2**29 and gpu_bytes("800MB") == 800 * 2**20
    for wrong in ("", "24", "0GB", "-1GB"):
        with pytest.raises(InputError, match="no size of memory"):
            gpu_bytes(wrong)

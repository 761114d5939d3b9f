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

SETTINGS = ["--context-tokens", "100", "--prompt-tokens", "20", "--batch-size", "4", "--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(hidden_size=96, num_hidden_layers=3).config.save_pretrained(folder)  # and no weights
    return str(folder)


def test_fits(folder, capsys):
    assert main(["plan", "--model", folder, "--gpu", "24GB", *SETTINGS, "--lora-rank", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["settings"] == {} and plan["teacher_path"] == "merge"
    assert plan["peak_bytes"] == max(phase["bytes"] for phase in plan["phases"].values())
    for phase in plan["phases"].values():
        assert phase["bytes"] == sum(phase["parts"].values())


def test_does_not_fit_and_says_by_how_much(folder, capsys):
    assert main(["plan", "--model", folder, "--gpu", "770MB", *SETTINGS]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "too much" in out and "lora_rank=16" in out


def test_settings_are_found(folder, capsys):
    arguments = ["plan", "--model", folder, "--device", "cpu", *SETTINGS, "--batch-size", "64", "--lora-rank", "4"]
    main([*arguments, "--gpu", "1GB", "--json"])
    free = json.loads(capsys.readouterr().out)["peak_bytes"]
    assert main([*arguments, "--gpu", f"{free / 2**20 / 2}MB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak_bytes"] <= free / 2 and plan["settings"]
    # The settings it prints are settings: without a search they are found to fit as well.
    options = [word for name, value in plan["settings"].items()
               for word in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))]  # fmt: skip
    assert main([*arguments, *options, "--gpu", f"{free / 2**20 / 2}MB", "--no-search", "--json"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "24 apples"], "gpu='24 apples'"),
        (["--gpu", "100MB"], "less than"),
        (["--gpu", "1GB", "--context", "x.txt"], "one of them"),
        (["--gpu", "1GB", "--eval-prompts", "p.jsonl"], "give context"),
        (["--gpu", "1GB", "--lora-alpha", "3"], "lora_alpha is set"),
    ],
)
def test_wrong_usage(folder, capsys, arguments, words):
    assert main(["plan", "--model", folder, *SETTINGS, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_lengths_come_from_files(tmp_path, folder, capsys):
    model = tmp_path / "m"
    tiny_model(hidden_size=96, num_hidden_layers=3).config.save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    (tmp_path / "c.txt").write_text("be brief " * 40)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": "q" * n}) + "\n" for n in (5, 50)))
    arguments = ["plan", "--model", str(model), "--gpu", "24GB", "--context", str(tmp_path / "c.txt"), "--json",
                 "--prompts", str(tmp_path / "p.jsonl"), "--batch-size", "2", "--max-new-tokens", "16"]  # fmt: skip
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    # Both prompts, with the template's tokens: more than their letters, less than with the context.
    assert 2 * (5 + 50) + 4 * 15 <= plan["micro_batch_tokens"] < 2 * (5 + 50) + 4 * 15 + 40
    keys = 3 * 2 * 2 * 24 * 2  # layers, keys and values, heads, head size, bytes
    assert plan["phases"]["student"]["parts"]["context KV"] >= 360 * keys


def test_rows_that_bring_their_contexts_need_no_other(tmp_path, capsys):
    tiny_model(hidden_size=96, num_hidden_layers=3).config.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    rows = [{"prompt": "q" * 9, "privileged_context": letter * 40} for letter in "ab"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", tmp_path / "m", "--prompts", tmp_path / "p.jsonl", "--batch-size", 2]
    found = as_plan(capsys, *arguments, "--max-new-tokens", 16)
    keys = 3 * 2 * 2 * 24 * 2  # layers, keys and values, heads, head size, bytes
    assert found["phases"]["student"]["parts"]["context KV"] >= 2 * 40 * keys
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "no context"}) + "\n")
    assert main(["plan", "--gpu", "24GB", *map(str, arguments)]) == 2
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
def written(tmp_path):
    """The YAML file of a run, with everything that it names but the weights."""
    tiny_model(hidden_size=96, num_hidden_layers=3).config.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "c.txt").write_text("be brief " * 30)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "q" * 30}) + "\n")
    (tmp_path / "e.jsonl").write_text(json.dumps({"prompt": "other"}) + "\n")
    settings = {
        "model": str(tmp_path / "m"), "prompts": str(tmp_path / "p.jsonl"), "context": str(tmp_path / "c.txt"),
        "eval_prompts": str(tmp_path / "e.jsonl"), "lora_rank": 4, "batch-size": 2, "max_new_tokens": 16,
        "learning_rate": "1e-4", "rollout_batch": 2,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    return tmp_path / "run.yaml", settings


def as_plan(capsys, *arguments):
    status = main(["plan", "--gpu", "24GB", "--json", *map(str, arguments)])
    assert status == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_file_of_a_run_is_planned_as_written(written, capsys):
    file, settings = written
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    wanted = as_plan(capsys, *words)
    found = as_plan(capsys, "--config", file)
    assert found["peak_bytes"] == pytest.approx(wanted["peak_bytes"], rel=1e-4)
    assert {**found, "phases": list(found["phases"]), "peak_bytes": 0} == {
        **wanted, "phases": list(wanted["phases"]), "peak_bytes": 0
    }  # fmt: skip
    assert found["phases"]["backward"]["parts"]["adapter"] and "evaluation" in found["phases"]
    assert plan_command(["--config", str(file), "--gpu", "1GB"])[1] == train_command(["--config", str(file)])[1]
    more = as_plan(capsys, "--config", file, "--batch-size", "6")
    assert more["micro_batch_tokens"] == 3 * wanted["micro_batch_tokens"]
    numbers = as_plan(capsys, "--config", file, "--context-tokens", 300, "--prompt-tokens", 20)
    assert "evaluation" not in numbers["phases"]
    keys = 3 * 2 * 2 * 24 * 2  # layers, keys and values, heads, head size, bytes
    assert numbers["phases"]["student"]["parts"]["context KV"] == 300 * keys


def test_the_turns_of_a_task_are_planned(written, capsys):
    pytest.importorskip("gymnasium")
    file, settings = written
    Path(settings["context"]).write_text("be brief")
    lines = [f"{name}: {value}\n" for name, value in settings.items() if name not in ("prompts", "eval_prompts")]
    file.write_text("".join(lines) + "task: frozen-lake-gymnasium\ntask_options: '{\"max_turns\": 4}'\n")
    found = as_plan(capsys, "--config", file)
    assert any("4 turns" in note for note in found["notes"]) and "evaluation rollout" in found["phases"]
    one = as_plan(capsys, "--config", file, "--task-options", '{"max_turns": 1}')
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
        ("lora_rnk: 4", "did you mean 'lora_rank'"),
        ("steps: many", "steps='many' must be a whole number"),
    ],
)
def test_a_file_that_cannot_be_planned(written, capsys, line, words):
    file, _ = written
    file.write_text(file.read_text() + line + "\n")
    assert main(["plan", "--config", str(file), "--gpu", "24GB"]) == 2
    assert words in capsys.readouterr().err


def test_the_gpu_is_asked_for(written, capsys):
    assert main(["plan", "--config", str(written[0])]) == 2
    assert "--gpu" in capsys.readouterr().err


def test_sizes_of_memory():
    assert gpu_bytes("24GB") == gpu_bytes("24 GiB") == gpu_bytes("24g") == 24 * 2**30
    assert gpu_bytes("1.5GB") == 3 * 2**29 and gpu_bytes("800MB") == 800 * 2**20
    for wrong in ("", "24", "0GB", "-1GB"):
        with pytest.raises(InputError, match="no size of memory"):
            gpu_bytes(wrong)

"""Python code that comes with a model, a tokenizer or a run runs for --trust-remote-code alone, whoever answers "y"."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from report_runs import CONTEXT, make_run, save_base, write_lines

from opcd_fast.cli import main
from opcd_fast.models import load_model, load_tokenizer

MODULE = """
open({mark!r}, "a").write("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    base = save_base(root / "base")
    make_run(base, root / "whole", steps=1, lora_rank=0, learning_rate=1e-4)
    make_run(base, root / "adapter", steps=1)
    return root


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A base and two runs, all of whose models and tokenizers ask for code of their own; "y" to every question."""
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    shutil.copytree(made, tmp_path / "made")
    root = tmp_path / "made"
    for folder in (root / "base", root / "whole" / "final", root / "adapter" / "final"):
        (folder / "own.py").write_text(MODULE.format(mark=str(tmp_path / "mark")))
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(MODULE.format(mark=str(tmp_path / "mark")))
        edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer",
             auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})  # fmt: skip
        if (folder / "config.json").is_file():
            edit(folder / "config.json", model_type="own_llama", architectures=["OwnModel"],
                 auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})  # fmt: skip
    for run in ("whole", "adapter"):
        edit(root / run / "config.json", trust_remote_code=True)  # what a run's folder says does not count
        made_from = {"name": str(root / "base"), "commit": None, "files": {}, "fingerprint": None}
        edit(root / run / "run.json", base=made_from)
        if run == "adapter":
            edit(root / run / "final" / "adapter_config.json", base_model_name_or_path=str(root / "base"))
    write_lines(root / "prompts.jsonl", [{"prompt": f"question {i}"} for i in range(4)])
    (root / "context.txt").write_text(CONTEXT)
    return root


def edit(file, **changes):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **changes}))


def commands(root):
    base, data = str(root / "base"), ["--context", str(root / "context.txt"), "--prompts", str(root / "prompts.jsonl")]
    small = ["--batch-size", "2", "--max-new-tokens", "2", "--steps", "1", "--lora-rank", "2", "--device", "cpu"]
    new = ["--output-dir", str(root / "new")]
    return {
        "report": ["report", str(root / "whole"), "--model", base, "--max-prompts", "2", "--max-new-tokens", "2"],
        "report an adapter": ["report", str(root / "adapter")],
        "export": ["export", str(root / "whole"), *new],
        "export an adapter": ["export", str(root / "adapter"), "--merged", *new],
        "generate": ["generate", "--model", base, "--prompt", "a", "--max-new-tokens", "2"],
        "generate by an adapter": ["generate", "--model", str(root / "adapter" / "final"), "--prompt", "a"],
        "train": ["train", "--model", base, *data, *small, *new],
        "train on": ["train", "--model", base, "--init", str(root / "whole"), *data, *new],
        "plan": ["plan", "--model", base, "--gpu", "24GB", *data, *small],
        "compare": ["compare", "--model", base, "--eval-prompts", str(root / "prompts.jsonl"), *data, *small, *new],
        "compress": ["compress", "--model", base, *data, *new],
        "prompts": ["prompts", "--model", base, "--ask", "2", "--context", str(root / "context.txt"), *new],
        "extract": ["extract", "--model", base, "--task", "frozen-lake", *new],
        "accumulate": ["accumulate", "--model", base, *new],
    }  # fmt: skip


@pytest.mark.parametrize("name", commands(Path(".")))
def test_code_in_a_folder_does_not_run(place, name, capsys):
    assert main(commands(place)[name]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("opcd: ") and "Traceback" not in "".join(said)
    if name != "train on":  # refused for its base before anything is loaded
        assert "--trust-remote-code" in said[-1], said
    assert not (place.parent / "mark").exists()
    assert not (place / "new").exists() or name in ("extract", "accumulate")


def test_the_flag_runs_it(place, capsys):
    for folder in place.rglob("custom_generate"):
        shutil.rmtree(folder)
    for name in ("generate", "report", "plan", "export", "train"):
        mark = place.parent / "mark"
        mark.unlink(missing_ok=True)
        for module in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[module]
        shutil.rmtree(place.parent / "modules", ignore_errors=True)
        shutil.rmtree(place / "new", ignore_errors=True)
        status = main([*commands(place)[name], "--trust-remote-code"])
        assert status == 0 and mark.exists(), (name, capsys.readouterr().err)
    assert json.loads((place / "new" / "config.json").read_text())["trust_remote_code"] is True


def test_a_file_of_settings_cannot_give_it(place, capsys):
    (place / "opcd.yaml").write_text("trust_remote_code: true\n")
    assert main([*commands(place)["train"], "--config", str(place / "opcd.yaml")]) == 2
    assert "command line alone" in capsys.readouterr().err and not (place.parent / "mark").exists()


def test_in_python(place):
    shutil.rmtree(place / "base" / "custom_generate")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match="trust-remote-code"):
            load(place / "base")
    assert type(load_model(place / "base", trust_remote_code=True)).__name__ == "OwnModel"

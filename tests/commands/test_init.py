"""`opcd init`: a config that explains every setting, stands at the defaults, and trains."""

import dataclasses
import json
import re

import pytest
import yaml
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.cli import main
from opcd_fast.commands.init import EXAMPLE, EXAMPLE_FILES, config_text
from opcd_fast.commands.train import TrainCommand, train_command
from opcd_fast.training.settings import OPCDConfig, option_names, settings_of


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_setting_is_there_once_with_its_default_and_what_it_means():
    text = config_text({"model": "M", "prompts": "P"})
    settings = yaml.safe_load("\n".join(re.sub(r"^# (\w+: )", r"\1", line) for line in text.splitlines()
                                        if re.match(r"(# )?[a-z_]+: ", line)))  # fmt: skip
    names = [name for name in option_names(TrainCommand, OPCDConfig) if name != "run"]
    assert list(settings) == names
    for name in names:
        assert len(re.findall(rf"^(?:# )?{name}: ", text, re.MULTILINE)) == 1
    for kind in (TrainCommand, OPCDConfig):
        for name, words in ((f.name, k.help) for f, k in settings_of(kind)):
            assert words in " ".join(text.replace("\n# ", " ").split()), name
    assert OPCDConfig(**{n: settings[n] for n in option_names(OPCDConfig)}) == OPCDConfig()


def test_what_is_written_is_what_train_reads(here, capsys):
    assert main(["init"]) == 0
    assert "opcd train --config opcd.yaml" in capsys.readouterr().out
    command, _ = train_command(["--config", "opcd.yaml"])
    assert command.run.checked() == OPCDConfig(**EXAMPLE)
    assert (command.model, command.context, command.eval_prompts) == ("smollm2", "context.json", "held_out.jsonl")
    command, _ = train_command(["--config", "opcd.yaml", "--steps", "3"])
    assert command.run.checked() == dataclasses.replace(OPCDConfig(**EXAMPLE), steps=3)


def test_the_example_trains_at_once(here, capsys):
    tiny_model(max_position_embeddings=2048).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    assert main(["init", "--folder", "mine here", "--model", "model"]) == 0
    capsys.readouterr()
    more = ["--steps", "1", "--max-new-tokens", "2", "--eval-batch", "2", "--device", "cpu"]
    assert main(["train", "--config", "mine here/opcd.yaml", *more]) == 0
    assert json.loads((here / "runs/first/config.json").read_text())["lora_rank"] == 16


@pytest.mark.parametrize("name", ["opcd.yaml", *EXAMPLE_FILES])
def test_nothing_is_replaced(here, capsys, name):
    (here / name).write_text("mine")
    assert main(["init"]) == 2
    error = capsys.readouterr().err
    assert name in error and "exists already" in error and error.count("\n") == 1
    assert [path.name for path in here.iterdir()] == [name] and (here / name).read_text() == "mine"


def test_a_place_that_cannot_be_written_is_one_line(here, capsys):
    (here / "file").write_text("")
    assert main(["init", "--folder", "file"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["init", "--model", " "]) == 2
    assert "model is empty" in capsys.readouterr().err

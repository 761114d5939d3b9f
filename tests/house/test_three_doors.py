"""YAML = command line = Python: each setting, given through each door, makes the same OPCDConfig."""

import dataclasses
import json
import re

import pytest
import yaml

from opcd_fast.commands.train import train_command
from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig, option_names

# Settings without which another one is refused.
COMPANIONS = (
    {},
    {"lora_rank": 4},
    {"divergence": "jsd"},
    {"divergence": "skew_reverse_kl"},
    {"divergence": "topk_reverse_kl"},
    {"divergence": "gated_kl"},
    {"teacher_mode": "ema"},
    {"teacher_mode": "periodic"},
    {"answers": "teacher"},
    {"rollout": "server", "rollout_url": "http://localhost:1"},
    {"rollout": "server"},
    {"rollout": "vllm"},
    {"rollout": "replay", "rollout_file": "a.jsonl"},
    {"rollout": "replay"},
    {"early_stop_patience": 2},
    {"importance_correction": "token"},
)
DEFAULTS = OPCDConfig()
FIELDS = {field.name: field for field in dataclasses.fields(OPCDConfig)}


def candidates(name):
    """Values of the declared type that are not the default: named in the setting's description, or made up."""
    kind = str(FIELDS[name].type).partition(" | ")[0]
    default = FIELDS[name].default
    quoted = re.findall(r'"([\w:]+)"', FIELDS[name].metadata["setting"].help)
    made = {
        "bool": [True, False],
        "int": [7, 1],
        "float": [0.25, 0.5, 1e-05],
        "str": ['{"enable_thinking": false}', *quoted, "a b", "q_proj,v_proj"],
        "tuple[str, ...]": [("<a>", "- b", "null"), tuple(quoted)],
    }[kind]
    return [value for value in made if value != default]


def settings_with(name):
    for companions in COMPANIONS:
        for value in candidates(name):
            if name in companions:
                continue
            settings = {**companions, name: value}
            try:
                config = OPCDConfig(**settings)
            except InputError:
                continue
            if getattr(config, name) != getattr(DEFAULTS, name):
                return settings, config
    if re.findall(r'"([\w:]+)"', FIELDS[name].metadata["setting"].help) == [FIELDS[name].default]:
        return {name: FIELDS[name].default}, DEFAULTS  # a setting with a single value so far
    raise AssertionError(f"no value other than the default found for {name}; describe its values in quotes, or add one")


def as_arguments(settings):
    words = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        declared = str(FIELDS[name].type)
        if declared == "bool":
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [option, *value]
        else:
            words += [option, str(value)]
    return words


def trained_with(*arguments):
    """The settings that a command line says, without a preset."""
    return train_command(list(arguments))[0].run.checked()


@pytest.mark.parametrize("name", option_names(OPCDConfig))
def test_every_setting_through_every_door(name, tmp_path):
    settings, wanted = settings_with(name)
    required = ["--model", "M", "--prompts", "P"]
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**plain, "model": "M", "prompts": "P"}))
    (tmp_path / "b.yaml").write_text(json.dumps({key.replace("_", "-"): value for key, value in plain.items()}))
    assert trained_with(*required, *as_arguments(settings)) == wanted
    if name == "trust_remote_code":  # no file may say that
        with pytest.raises(InputError, match="command line alone"):
            trained_with("--config", str(tmp_path / "a.yaml"))
        return
    assert trained_with("--config", str(tmp_path / "a.yaml")) == wanted
    assert trained_with(*required, "--config", str(tmp_path / "b.yaml")) == wanted
    assert OPCDConfig(**dataclasses.asdict(wanted)) == wanted


def test_template_variables_as_an_object_or_as_text(tmp_path):
    wanted = OPCDConfig(chat_template_kwargs={"b": [1], "a": False})
    assert wanted == OPCDConfig(chat_template_kwargs='{"a": false, "b": [1]}')
    assert wanted.template_variables() == {"a": False, "b": [1]} and DEFAULTS.template_variables() == {}
    (tmp_path / "a.yaml").write_text("model: M\nprompts: P\nchat_template_kwargs:\n  a: false\n  b: [1]\n")
    assert trained_with("--config", str(tmp_path / "a.yaml")) == wanted
    for bad in ("{", "[1]", "5", "null", {1, 2}, {"a": {1}}, 5):
        with pytest.raises(InputError, match="chat_template_kwargs"):
            OPCDConfig(chat_template_kwargs=bad)

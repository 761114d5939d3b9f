"""Settings: all that is known of one stands in its line, what is accepted, and that everything else is one error."""

from __future__ import annotations  # as in config.py: types are read as text

import dataclasses
import json
import math
from dataclasses import dataclass

import pytest

from opcd_fast.commands.arguments import parse
from opcd_fast.errors import InputError
from opcd_fast.training.settings import (
    OPCDConfig,
    check_names,
    group_of,
    option_names,
    read_yaml,
    settings_of,
    settings_with,
    typed_values,
)
from opcd_fast.training.settings.checks import check
from opcd_fast.training.settings.setting import BELONGINGS, AtLeast, OneOf

FIELDS = {field.name: known for field, known in settings_of(OPCDConfig)}


@pytest.mark.parametrize("name", option_names(OPCDConfig))
def test_every_setting_says_what_it_is_and_where_it_belongs(name):
    known = FIELDS[name]
    assert len(known.help) > 15 and "\n" not in known.help and known.group
    assert known.belongs and known.belongs <= BELONGINGS.keys()
    assert ("result" in known.belongs) != ("resume" in known.belongs)
    assert known.needs.keys() <= FIELDS.keys()
    with pytest.raises(InputError, match=name):  # every type is checked
        OPCDConfig(**{name: object()})


def test_belongings():
    assert settings_with(belongs="divergence") == ("divergence", "beta", "alpha", "k", "tail", "gate")
    assert settings_with(belongs="comparison") == ("output_dir", "seed", "resume")
    free = settings_with(belongs="resume")
    assert {"output_dir", "steps", "device", "share_prompts", "rollout_url", "rollout_command", "plots"} <= {*free}
    assert not {"seed", "learning_rate", "lora_rank", "max_new_tokens", "teacher_path"} & {*free}
    assert {*free} | {*settings_with(belongs="result")} == {*option_names(OPCDConfig)}


def test_a_new_setting_is_one_line(tmp_path, capsys):
    @dataclass(frozen=True)
    class Wider(OPCDConfig):
        """As a new version would have it."""

        patience: int = group_of("New ones")(3, "How long to wait.", AtLeast(1), needs={"answers": OneOf("teacher")})

        def __post_init__(self):
            assert typed_values(Wider, vars(self)) == vars(self)
            check(self)

    words = ["--patience", "5", "--answers", "teacher"]
    assert parse(Wider, "train", words) == Wider(patience=5, answers="teacher")
    with pytest.raises(SystemExit):
        parse(Wider, "train", ["--help"])
    assert "How long to wait." in capsys.readouterr().out
    with pytest.raises(InputError, match="patience=0 must be a whole number"):
        Wider(patience=0)
    with pytest.raises(InputError, match="patience is set, but answers='student'"):
        Wider(patience=5)


def test_the_papers_defaults():
    config = OPCDConfig()
    assert (config.steps, config.batch_size, config.rollouts_per_prompt) == (50, 128, 1)
    assert (config.weight_decay, config.max_grad_norm, config.top_p) == (0.01, 1.0, 1.0)
    assert config.learning_rate_for(adapter=False) == 5e-6
    assert OPCDConfig(lora_rank=8).learning_rate_for(adapter=True) == 1e-3
    assert OPCDConfig(num_virtual_tokens=8).learning_rate_for(adapter=True) == 2e-2
    assert OPCDConfig(lora_rank=8, learning_rate=3e-4).learning_rate_for(adapter=True) == 3e-4


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", (0, 2.5, math.nan, "5", None)), ("batch_size", (-1,)), ("max_new_tokens", (True,)), ("k", (2.5,)),
        ("temperature", (0, "warm", math.nan, math.inf, True, "1")), ("top_p", (0, 1.5, math.nan)),
        ("learning_rate", (0, math.nan, "1e-4")), ("weight_decay", (2, math.nan)), ("max_grad_norm", (-1, math.inf)),
        ("divergence", ("kl",)), ("tail", (5,)), ("beta", (0.3, 2.0)), ("teacher_mode", ("moving",)),
        ("teacher_ema_decay", (0.9, 1.5)), ("teacher_sync_every", (5, 0)), ("teacher_quantization", ("8bit",)),
        ("quantization", ("nf4",)), ("normalize", ("batch",)), ("dtype", ("float16", ["float32"])), ("device", (0,)),
        ("loss_backend", ("cuda",)), ("teacher_path", ("best",)), ("lora_alpha", (8, 8.0)), ("lora_rank", (-4,)),
        ("lora_targets", ("", " , ", [], [1], 5)), ("merge_for_rollout", ("True", 0)), ("seed", (-1, 1.0)),
        ("micro_batch_tokens", (0,)), ("workspace_bytes", (0,)), ("max_prefix_bytes", (0, 1.5)),
        ("teacher_batch_bytes", (0,)), ("prefix_device", (0,)), ("keep_checkpoints", (0,)), ("optimizer", ("sgd",)),
        ("best_by", ("loss", "score")), ("early_stop_patience", (-1,)), ("early_stop_delta", (0.1,)),
        ("importance_correction", ("exact",)), ("importance_clip", (3.0, 0)), ("trackers", (["mlflow"], "wandb")),
        ("save_best", (1,)), ("plots", ("no",)), ("scorer", ("",)), ("output_dir", ("", 5, None)),
        ("stop_tokens", ("abc", ["a", 5], [""], None)), ("gradient_checkpointing", ("no", 1)), ("resume", ("false",)),
        ("answers", ("everyone",)), ("objective", ("ppo", "nll")), ("kept_answers", (1, -1)),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(name, values):
    for value in values:
        with pytest.raises(InputError, match=name) as error:
            OPCDConfig(**{name: value})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"divergence": "skew_reverse_kl", "alpha": 1.0}, "alpha"),
        ({"divergence": "topk_reverse_kl", "tail": "drop"}, "tail"),
        ({"divergence": "jsd", "k": 5}, "k is set"),
        ({"save_best": True, "eval_every": 0}, "set eval_every"),
        ({"early_stop_patience": 2, "eval_every": 0}, "set eval_every"),
        ({"early_stop_patience": 2, "early_stop_delta": -1.0}, "early_stop_delta"),
        ({"importance_correction": "token", "top_p": 0.9}, "needs top_p=1"),
        ({"prefix_device": "cpu", "teacher_path": "concat"}, "prefix_device is set"),
        ({"teacher_offload": True, "teacher_mode": "ema"}, "teacher_offload is set.*teacher_mode='ema'.*use 'frozen'"),
        ({"objective": "nll", "answers": "teacher", "divergence": "jsd"}, "divergence='jsd'"),
        ({"kept_answers": 1, "answers": "teacher", "teacher_mode": "live"}, "kept_answers"),
        ({"importance_correction": "token", "objective": "nll", "answers": "teacher"}, "objective='nll' has none"),
        ({"importance_correction": "token", "objective": "nll", "rollout": "replay", "rollout_file": "f"}, "has none"),
        ({"importance_correction": "sequence", "answers": "teacher"}, "answers='teacher' has none"),
        ({"rollout": "server", "rollout_url": "http://x", "answers": "teacher"}, "samples the student"),
    ],
)
def test_settings_that_do_not_go_together(settings, word):
    with pytest.raises(InputError, match=word):
        OPCDConfig(**settings)
    OPCDConfig(save_best=True, best_by="score", early_stop_patience=2, early_stop_delta=0.1, trackers=["wandb"])


def test_lists_and_paths_are_normalised_and_config_json_makes_the_same_settings_again(tmp_path):
    config = OPCDConfig(
        stop_tokens=["<a>", "\n"], lora_targets=["q_proj", "v_proj"], output_dir=tmp_path, temperature=1,
        chat_template_kwargs={"a": [1]}, trackers=["wandb"],
    )  # fmt: skip
    assert (config.stop_tokens, config.lora_targets) == (("<a>", "\n"), "q_proj,v_proj")
    assert (config.output_dir, config.temperature) == (str(tmp_path), 1)
    assert OPCDConfig(lora_targets="q_proj, v_proj").lora_targets == "q_proj,v_proj"
    assert dataclasses.replace(config, steps=3).stop_tokens == config.stop_tokens
    assert OPCDConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", "not valid YAML"), (b"- a\n", "name: value"), ("output_dir: läufe\n".encode("latin-1"), "UTF-8"),
        (b"steps: 2024-99-99\n", "not valid YAML"), (b"0\n", "name: value"),
        (b"steps: 4\nlora_rank: 2\nlora-rank: 8\n", "sets lora_rank 2 times"), (None, "does not exist"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named(tmp_path, content, words):
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_yaml(file)


def test_yaml_names_are_checked_with_a_hint(tmp_path):
    for content, read in (("batch-size: 4\nlora_rank: 2\n", {"batch_size": 4, "lora_rank": 2}), ("", {})):
        (tmp_path / "c.yaml").write_text(content)
        assert read_yaml(tmp_path / "c.yaml") == read
    with pytest.raises(InputError, match="did you mean 'batch_size'"):
        check_names({"batchsize": 4}, option_names(OPCDConfig), "config")

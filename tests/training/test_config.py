"""Settings: what is accepted, and that everything else is one clear error."""

import dataclasses
import math

import pytest

from opcd_fast.errors import InputError
from opcd_fast.training.settings.config import OPCDConfig
from opcd_fast.training.settings.options import check_names, option_names, read_yaml


def test_the_papers_defaults():
    config = OPCDConfig()
    assert (config.steps, config.batch_size, config.rollouts_per_prompt) == (50, 128, 1)
    assert (config.weight_decay, config.max_grad_norm, config.top_p) == (0.01, 1.0, 1.0)
    assert config.learning_rate_for(adapter=False) == 5e-6
    assert OPCDConfig(lora_rank=8).learning_rate_for(adapter=True) == 1e-3
    assert OPCDConfig(num_virtual_tokens=8).learning_rate_for(adapter=True) == 2e-2
    assert OPCDConfig(lora_rank=8, learning_rate=3e-4).learning_rate_for(adapter=True) == 3e-4


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"divergence": "jsd", "beta": 2.0}, "beta"),
        ({"divergence": "skew_reverse_kl", "alpha": 1.0}, "alpha"),
        ({"divergence": "topk_reverse_kl", "tail": "drop"}, "tail"),
        ({"beta": 0.3}, "beta is set"),
        ({"divergence": "jsd", "k": 5}, "k is set"),
    ],
)
def test_a_divergence_with_a_bad_parameter_is_refused(settings, word):
    with pytest.raises(InputError, match=word):
        OPCDConfig(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("steps", 2.5), ("batch_size", -1), ("max_new_tokens", True), ("temperature", 0),
        ("temperature", "warm"), ("top_p", 0), ("top_p", 1.5), ("learning_rate", 0), ("weight_decay", 2),
        ("max_grad_norm", -1), ("divergence", "kl"), ("k", 2.5), ("tail", 5),
        ("teacher_mode", "moving"), ("teacher_ema_decay", 0.9), ("teacher_sync_every", 5), ("teacher_sync_every", 0),
        ("teacher_ema_decay", 1.5), ("teacher_quantization", "8bit"), ("quantization", "nf4"), ("normalize", "batch"),
        ("dtype", "float16"), ("loss_backend", "cuda"), ("teacher_path", "best"), ("lora_alpha", 8),
        ("merge_for_rollout", True), ("micro_batch_tokens", 0), ("workspace_bytes", 0), ("seed", -1),
        ("max_prefix_bytes", 0), ("max_prefix_bytes", 1.5), ("prefix_device", 0), ("teacher_batch_bytes", 0),
        ("keep_checkpoints", 0), ("lora_rank", -4),
        ("best_by", "loss"), ("best_by", "score"), ("early_stop_patience", -1), ("early_stop_delta", 0.1),
        ("importance_correction", "exact"), ("importance_clip", 3.0), ("importance_clip", 0), ("trackers", ["mlflow"]),
        ("trackers", "wandb"), ("save_best", 1), ("plots", "no"), ("scorer", ""),
        # wrong types, some of which Python would take for something else
        ("stop_tokens", "abc"), ("stop_tokens", ["a", 5]), ("stop_tokens", [""]), ("stop_tokens", None),
        ("gradient_checkpointing", "no"), ("gradient_checkpointing", 1), ("resume", "false"), ("resume", None),
        ("output_dir", ""), ("output_dir", 5), ("output_dir", None), ("lora_targets", ""), ("lora_targets", " , "),
        ("lora_targets", []), ("lora_targets", [1]), ("lora_targets", 5), ("device", 0), ("dtype", ["float32"]),
        ("temperature", math.nan), ("temperature", math.inf), ("temperature", True), ("temperature", "1"),
        ("top_p", math.nan), ("learning_rate", math.nan), ("learning_rate", "1e-4"), ("weight_decay", math.nan),
        ("max_grad_norm", math.inf), ("steps", math.nan), ("steps", "5"), ("seed", 1.0), ("lora_alpha", 8.0),
        ("merge_for_rollout", "True"), ("merge_for_rollout", 0), ("steps", None),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(name, value):
    with pytest.raises(InputError, match=name) as error:
        OPCDConfig(**{name: value})
    assert "\n" not in str(error.value)


def test_every_field_has_a_type_that_is_checked():
    for name in option_names(OPCDConfig):
        with pytest.raises(InputError, match=name):
            OPCDConfig(**{name: object()})


def test_a_list_is_asked_for_where_a_text_would_become_letters():
    with pytest.raises(InputError, match=r"list of texts: \['abc'\]"):
        OPCDConfig(stop_tokens="abc")


def test_lists_and_paths_are_normalised(tmp_path):
    config = OPCDConfig(
        stop_tokens=["<a>", "\n"], lora_targets=["q_proj", "v_proj"], output_dir=tmp_path, temperature=1
    )
    assert (config.stop_tokens, config.lora_targets) == (("<a>", "\n"), "q_proj,v_proj")
    assert (config.output_dir, config.temperature) == (str(tmp_path), 1)
    assert OPCDConfig(lora_targets="q_proj, v_proj").lora_targets == "q_proj,v_proj"
    assert dataclasses.replace(config, steps=3).stop_tokens == config.stop_tokens


def test_yaml_names_are_checked_with_a_hint(tmp_path):
    (tmp_path / "c.yaml").write_text("batch-size: 4\nlora_rank: 2\n")
    assert read_yaml(tmp_path / "c.yaml") == {"batch_size": 4, "lora_rank": 2}
    with pytest.raises(InputError, match="did you mean 'batch_size'"):
        check_names({"batchsize": 4}, option_names(OPCDConfig), "config")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")
    with pytest.raises(InputError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(InputError, match="name: value"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes("output_dir: läufe\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "date.yaml").write_text("steps: 2024-99-99\n")
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml(tmp_path / "date.yaml")
    (tmp_path / "zero.yaml").write_text("0\n")
    with pytest.raises(InputError, match="name: value"):
        read_yaml(tmp_path / "zero.yaml")
    (tmp_path / "twice.yaml").write_text("steps: 4\nlora_rank: 2\nlora-rank: 8\n")
    with pytest.raises(InputError, match="sets lora_rank 2 times"):
        read_yaml(tmp_path / "twice.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_storage_of_prefixes_that_concat_does_not_keep():
    assert OPCDConfig(prefix_device="cpu").prefix_device == "cpu"
    with pytest.raises(InputError, match="prefix_device is set, but teacher_path='concat' keeps no caches"):
        OPCDConfig(prefix_device="cpu", teacher_path="concat")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"save_best": True, "eval_every": 0}, "set eval_every"),
        ({"early_stop_patience": 2, "eval_every": 0}, "set eval_every"),
        ({"early_stop_patience": 2, "early_stop_delta": -1.0}, "early_stop_delta"),
        ({"importance_correction": "token", "top_p": 0.9}, "needs top_p=1"),
    ],
)
def test_settings_that_do_not_go_together(settings, word):
    with pytest.raises(InputError, match=word):
        OPCDConfig(**settings)
    OPCDConfig(save_best=True, best_by="score", early_stop_patience=2, early_stop_delta=0.1, trackers=["wandb"])

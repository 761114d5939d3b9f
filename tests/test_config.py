"""Settings: what is accepted, and that everything else is one clear error."""

import pytest

from opcd_fast.config import OPCDConfig, check_names, option_names, read_yaml
from opcd_fast.errors import InputError


def test_the_papers_defaults():
    config = OPCDConfig()
    assert (config.steps, config.batch_size, config.rollouts_per_prompt) == (50, 128, 1)
    assert (config.weight_decay, config.max_grad_norm, config.top_p) == (0.01, 1.0, 1.0)
    assert config.effective_learning_rate == 5e-6
    assert OPCDConfig(lora_rank=8).effective_learning_rate == 1e-3
    assert OPCDConfig(lora_rank=8, learning_rate=3e-4).effective_learning_rate == 3e-4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("steps", 2.5), ("batch_size", -1), ("max_new_tokens", True), ("temperature", 0),
        ("temperature", "warm"), ("top_p", 0), ("top_p", 1.5), ("learning_rate", 0), ("weight_decay", 2),
        ("max_grad_norm", -1), ("divergence", "jsd"), ("teacher_mode", "ema"), ("normalize", "batch"),
        ("dtype", "float16"), ("loss_backend", "native"), ("teacher_path", "pad"), ("lora_alpha", 8),
        ("merge_for_rollout", True), ("micro_batch_tokens", 0), ("workspace_bytes", 0), ("seed", -1),
        ("keep_checkpoints", 0), ("lora_rank", -4),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(name, value):
    with pytest.raises(InputError, match=name) as error:
        OPCDConfig(**{name: value})
    assert "\n" not in str(error.value)


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

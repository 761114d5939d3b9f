"""Which modules of a model get an adapter by default."""

import architectures
import pytest
import torch
from tiny_models import told

from opcd_fast.training.engines import student_and_teacher
from opcd_fast.training.settings import OPCDConfig


def adapted(name, tmp_path, **settings):
    config = OPCDConfig(lora_rank=2, output_dir=tmp_path, **settings)
    model = architectures.build(name)
    student = student_and_teacher(model, None, config, torch.device("cpu"), torch.float32).student
    modules = student.get_base_model().named_modules()
    return {place.rpartition(".")[2] for place, module in modules if hasattr(module, "lora_A")}


@pytest.mark.parametrize("name", ["falcon-h1", "nemotron-h", "granite-hybrid"])
def test_what_kernels_read_past_an_adapter_gets_none(name, tmp_path, caplog):
    """mamba_ssm's training kernel takes the weight of out_proj itself; all else stays adapted."""
    assert {"in_proj", "q_proj", "o_proj"} <= (names := adapted(name, tmp_path)) and "out_proj" not in names
    assert "no adapter on out_proj of" in told(caplog)[0].getMessage()
    assert adapted(name, tmp_path, lora_targets="in_proj,out_proj") == {"in_proj"}


@pytest.mark.parametrize("name", ["lfm2", "qwen3.5"])
def test_other_layers_of_that_name_do(name, tmp_path, caplog):
    assert "out_proj" in adapted(name, tmp_path) and not told(caplog)

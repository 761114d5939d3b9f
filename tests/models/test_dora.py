"""DoRA: its teacher is the base, its folded copy computes what it computes, and it is resumed and exported exactly."""

import json
from functools import partial

import pytest
import torch
import training_runs
from resumption import check_resume
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.errors import InputError
from opcd_fast.export import ExportOptions, export
from opcd_fast.models import MergedCopy, load_model, merged
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training import OPCDConfig

make = partial(training_runs.make, tiny_tokenizer(), use_dora=True)
IDS = torch.tensor([[40, 41, 42, 99, 130, 7, 250]])


def dora_model(seed=0, dtype=torch.float32, **changes):
    """An adapter all of whose parts do something."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dora = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model(dtype=dtype, **changes), dora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
            if "magnitude" in name:
                parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_the_folded_copy_computes_what_the_adapter_computes(changes):
    model = dora_model(**changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    assert MergedCopy.supports(model)
    trained = logits(model)
    copied = MergedCopy(model)
    torch.testing.assert_close(logits(copied.refresh()), trained, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (logits(model) - trained).abs().max() > 0.1
    for name, parameter in model.named_parameters():  # and again, after a step
        if "magnitude" in name:
            parameter.data *= 1.3
    moved = logits(model)
    assert (moved - trained).abs().max() > 0.1
    torch.testing.assert_close(logits(copied.refresh()), moved, rtol=1e-4, atol=1e-4)


def test_in_bf16_the_copy_is_rounded_once(monkeypatch):
    monkeypatch.setattr(merged, "cpu_has_bf16", lambda: True)  # elsewhere the copy is in float32
    model = dora_model(dtype=torch.bfloat16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    exact *= layer.lora_magnitude_vector["default"].weight.double()[:, None] / exact.norm(dim=1, keepdim=True)
    folded = MergedCopy(model).refresh().model.layers[0].self_attn.q_proj.weight.to_dense()  # where it lies in blocks
    assert folded.dtype == torch.bfloat16 and folded.shape == exact.shape
    assert (folded != exact.bfloat16()).float().mean() < 1e-2  # ties of two roundings


def test_training_moves_the_norms_and_leaves_the_teacher_the_base(tmp_path):
    trainer = make(tmp_path / "run", steps=20, batch_size=6, eval_every=20)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    norms = [name for name in trainer.parameters if "magnitude" in name]
    assert norms and all(trainer.parameters[name].dtype == torch.float32 for name in norms)
    assert "merge: True" in trainer.rollout.explain()
    result = trainer.train()
    assert result.evaluations[-1]["fixed_kl"] < 0.7 * result.evaluations[0]["fixed_kl"]
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainer.parameters), name
    settings = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert settings["use_dora"] is True
    base = ContextTeacher(tiny_model(), [1, 2, 3])
    bounds = torch.tensor([0, IDS.shape[1]], dtype=torch.int32)
    with_adapter = ContextTeacher(trainer.model, [1, 2, 3])
    assert torch.equal(with_adapter.hidden_states_packed(IDS[0], bounds), base.hidden_states_packed(IDS[0], bounds))
    on = ContextTeacher(trainer.model, [1, 2, 3], adapter="active")
    assert not torch.equal(on.hidden_states_packed(IDS[0], bounds), base.hidden_states_packed(IDS[0], bounds))


@pytest.mark.parametrize("mode", ["frozen", "ema"])
def test_resume_is_bit_identical(tmp_path, mode):
    decay = {"teacher_ema_decay": 0.8} if mode == "ema" else {}
    check_resume(partial(make, teacher_mode=mode, **decay), tmp_path)


def test_what_was_trained_is_what_is_exported(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "run", load_model(tmp_path / "base", dtype="float32"), steps=6, eval_every=0)
    trainer.train()
    for whole in (False, True):
        out = tmp_path / f"out-{whole}"
        assert export(tmp_path / "run", out, ExportOptions(merged=whole)).comparison.relative < 1e-5
        written = load_model(out, dtype="float32")
        torch.testing.assert_close(logits(written), logits(trainer.model), rtol=1e-4, atol=1e-4)


def test_it_needs_a_rank_and_a_sampler_that_can():
    with pytest.raises(InputError, match="use_dora is set, but lora_rank=0 must be a whole number of at least 1"):
        OPCDConfig(use_dora=True)
    for sampler in ({"rollout": "vllm"}, {"rollout": "server", "rollout_url": "http://localhost:1"}):
        with pytest.raises(InputError, match="use_dora: .* refuses DoRA"):
            OPCDConfig(use_dora=True, lora_rank=4, **sampler)
    OPCDConfig(use_dora=True, lora_rank=4, rollout="server", rollout_url="http://localhost:1", rollout_command="true")


def test_on_four_bits_it_trains_unmerged(tmp_path):
    pytest.importorskip("bitsandbytes")
    trainer = make(tmp_path / "run", tiny_model(hidden_size=64), quantization="4bit", steps=12, batch_size=6)
    assert "merge: False" in trainer.rollout.explain()
    result = trainer.train()
    assert result.evaluations[-1]["fixed_kl"] < result.evaluations[0]["fixed_kl"]

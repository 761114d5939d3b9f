"""Prompts with an empty privileged_context: their teacher is the base model, so the student is held to it there."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.errors import InputError
from opcd_fast.training import OPCDTrainer
from opcd_fast.training.settings import OPCDConfig

CONTEXT = "always answer with zzz"
OWN = [f"question {i}" for i in range(6)]
GENERAL = [{"prompt": f"{i} things to know", "privileged_context": ""} for i in range(10)]


def trained(folder, prompts, eval_prompts, steps, lora_rank=4, teacher_path="auto"):
    config = OPCDConfig(
        output_dir=str(folder), steps=steps, batch_size=8, max_new_tokens=6, learning_rate=1e-2, lora_rank=lora_rank,
        teacher_path=teacher_path, eval_every=steps, save_every=0, device="cpu", dtype="float32",
    )  # fmt: skip
    trainer = OPCDTrainer(
        tiny_model(), tiny_tokenizer(), CONTEXT, prompts, config, eval_prompts=eval_prompts, quiet=True
    )
    return trainer.train()


@pytest.mark.parametrize(("teacher_path", "lora_rank"), [("merge", 4), ("concat", 0)])
def test_their_divergence_is_zero_before_training(tmp_path, teacher_path, lora_rank):
    """General rows fill the first places, where the check that a context matters would look."""
    more = {"teacher_path": teacher_path, "lora_rank": lora_rank}
    first = trained(tmp_path / "a", [*GENERAL, *OWN], GENERAL[:4], 1, **more).evaluations[0]
    assert abs(first["own_kl"]) < 1e-6 and abs(first["fixed_kl"]) < 1e-6 and first["own_top1_agreement"] == 1
    assert trained(tmp_path / "b", [*GENERAL, *OWN], OWN[:4], 1, **more).evaluations[0]["own_kl"] > 1e-2


def test_training_with_them_keeps_the_student_at_the_base_model_there(tmp_path):
    unseen = [{"prompt": f"{i} things to see", "privileged_context": ""} for i in range(8)]
    without = trained(tmp_path / "a", OWN, unseen, 30).evaluations[-1]
    guarded = trained(tmp_path / "b", [*GENERAL, *OWN], unseen, 30).evaluations[-1]
    assert guarded["fixed_kl"] < 0.5 * without["fixed_kl"]


def test_nothing_but_general_prompts_is_refused(tmp_path):
    with pytest.raises(InputError, match="empty `privileged_context`"):
        trained(tmp_path / "run", GENERAL, None, 1)
    assert not (tmp_path / "run").exists()


def test_a_context_without_effect_is_still_found_among_them(tmp_path):
    """The context is rendered, but a model whose attention adds nothing cannot see it."""
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    config = OPCDConfig(output_dir=str(tmp_path / "run"), steps=1, max_new_tokens=2, lora_rank=2, device="cpu")
    trainer = OPCDTrainer(model, tiny_tokenizer(), CONTEXT, [*GENERAL, *OWN], config, quiet=True)
    with pytest.raises(InputError, match="context changes nothing"):
        trainer.train()
    assert not (tmp_path / "run").exists()

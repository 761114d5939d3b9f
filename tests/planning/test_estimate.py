"""What `opcd train` says of memory before it begins."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.loss import resolve_backend
from opcd_fast.planning import foreseen
from opcd_fast.planning.rehearsal import job_of, rehearse
from opcd_fast.training import OPCDConfig, OPCDTrainer
from opcd_fast.training.answers import read_training_prompts

CONTEXT, PROMPTS = "always answer with zzz " * 6, ["one", "two", "three", "four"]


@pytest.mark.parametrize("copies", [True, False])
def test_a_copy_that_answers_is_foreseen_where_there_is_one(tmp_path, monkeypatch, copies):
    monkeypatch.setenv("OPCD_CPU_BF16", str(int(copies)))
    config = OPCDConfig(output_dir=str(tmp_path / "run"), batch_size=4, steps=1, max_new_tokens=6, rollout_batch=4,
                        device="cpu", dtype="bfloat16")  # fmt: skip
    trainer = OPCDTrainer(tiny_model(), tiny_tokenizer(), CONTEXT, PROMPTS, config, quiet=True)
    monkeypatch.setenv("OPCD_CPU_BF16", "0")  # what was decided counts
    size = foreseen(trainer).peaks["loss"].parts.get("copy for answers", 0)
    weights = sum(p.numel() for p in tiny_model().parameters())
    assert size == pytest.approx(copies * 2 * weights, rel=1e-3)  # and RoPE's frequencies


def test_what_a_run_foresees_is_what_is_planned_for_it(tmp_path):
    """Before its first step, and without a change to what it will draw."""
    config = OPCDConfig(output_dir=str(tmp_path / "run"), lora_rank=8, batch_size=4, steps=1, max_new_tokens=6,
                        rollout_batch=4, device="cpu", dtype="float32")  # fmt: skip
    model = tiny_model()
    plain, tokenizer = model.config, tiny_tokenizer()
    trainer = OPCDTrainer(model, tokenizer, CONTEXT, PROMPTS, config, quiet=True)
    before = torch.get_rng_state()
    seen = foreseen(trainer)
    assert torch.equal(before, torch.get_rng_state())
    job = job_of(read_training_prompts(PROMPTS, None, CONTEXT, tokenizer, config), config)
    backend = resolve_backend("auto", torch.device("cpu"), torch.float32)
    planned = rehearse(config, job, plain, device="cpu", dtype=torch.float32, backend=backend)
    assert seen.nbytes == planned.nbytes > 100_000
    assert trainer.train().steps == 1

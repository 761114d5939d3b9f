"""Memory on a CUDA device: what a plan says against what torch's allocator held, and a retreat from a real shortage."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.planning.rehearsal import job_of, rehearse
from opcd_fast.runtime import timing
from opcd_fast.training import OPCDTrainer
from opcd_fast.training.answers import read_training_prompts
from opcd_fast.training.settings import OPCDConfig

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CONTEXT = "always answer with zzz, whatever the question may be, and never say why you do it. " * 12
PROMPTS = [f"question number {i}, " + "which is a long one. " * 20 for i in range(9)]
VOCABULARY = 32_000
SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 4096, "vocab_size": VOCABULARY, "initializer_range": 0.05,
}  # fmt: skip
CASES = {
    "lora": {"lora_rank": 16},
    "lora, checkpointing": {"lora_rank": 16, "gradient_checkpointing": True},
    "lora, micro-batches": {"lora_rank": 16, "micro_batch_tokens": 12_000},
    "lora, unmerged rollout": {"lora_rank": 16, "merge_for_rollout": False},
    "contexts on the host": {"lora_rank": 16, "prefix_device": "cpu"},
    "full": {},
    "full, average": {"teacher_mode": "ema"},
    "full, offloaded teacher": {"teacher_offload": True},
}
QUICK = ("lora, checkpointing", "full")


def config_of(folder, **settings):
    return OPCDConfig(
        **{
            "output_dir": str(folder), "device": DEVICE, "dtype": "bfloat16", "steps": 2, "batch_size": 16,
            "max_new_tokens": 128, "rollout_batch": 16, "merge_for_rollout": "lora_rank" in settings or None,
            "eval_every": 0, "save_every": 0, "plots": False, **settings,
        }
    )  # fmt: skip


def trainer_of(config):
    trainer = OPCDTrainer(
        tiny_model(**SIZES, dtype=torch.bfloat16), tiny_tokenizer(), CONTEXT, PROMPTS, config, quiet=True
    )
    # All answers have their full length.
    trainer.rollout.stop_token_ids, trainer.rollout.vocab_size = (VOCABULARY - 1,), VOCABULARY - 1
    return trainer


@contextmanager
def peaks_of_parts(monkeypatch):
    """{part: bytes at its worst moment} of the step that was last begun."""
    found, timed = {}, timing.Stopwatch.__call__

    @contextmanager
    def measuring(self, part):
        if part == "rollout":
            found.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with timed(self, part):
            yield
        torch.cuda.synchronize()
        found[part] = max(found.get(part, 0), torch.cuda.max_memory_allocated())

    with monkeypatch.context() as patch:
        patch.setattr(timing.Stopwatch, "__call__", measuring)
        yield found


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES])
def test_a_plan_is_within_a_tenth_of_what_the_allocator_held(name, tmp_path, monkeypatch):
    config = config_of(tmp_path / "run", **CASES[name])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainer = trainer_of(config)
    with peaks_of_parts(monkeypatch) as measured:
        trainer.train()
    job = job_of(read_training_prompts(PROMPTS, None, CONTEXT, trainer.tokenizer, config), config)
    predicted = rehearse(
        config, job, tiny_model(**SIZES).config, device="cuda", dtype=torch.bfloat16, backend="triton"
    )
    ratios = {part: predicted.peaks[part].nbytes / (nbytes - before) for part, nbytes in measured.items()}
    print(f"\nplan / measured, {name}: " + ", ".join(f"{part} {ratio:.3f}" for part, ratio in ratios.items()))
    worst = max(measured.values()) - before
    assert predicted.nbytes == pytest.approx(worst, rel=0.1)
    assert all(ratio == pytest.approx(1, rel=0.1) for ratio in ratios.values())


def test_a_step_that_does_not_fit_is_repeated_with_fewer_tokens(tmp_path, caplog):
    """The allocator really refuses here. The first step has the same answers either way."""
    settings = {"lora_rank": 16, "steps": 1}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole = trainer_of(config_of(tmp_path / "whole", **settings)).train()
    bound = 0.7 * torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(bound)
    try:
        with caplog.at_level(logging.WARNING):
            tight = trainer_of(config_of(tmp_path / "tight", **settings)).train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory, repeated" in caplog.text and "repeated with micro_batch_tokens=" in caplog.text
    assert tight.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=1e-2)
    assert tight.history[0]["grad_norm"] == pytest.approx(whole.history[0]["grad_norm"], rel=5e-2)

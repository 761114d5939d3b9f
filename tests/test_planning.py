"""The planner's predictions against what a real step allocates on the CPU."""

import pytest
import torch
from memory_record import recorded_peaks
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.config import OPCDConfig
from opcd_fast.loss_inputs import resolve_backend
from opcd_fast.planning.rehearsal import Job, rehearse
from opcd_fast.token_prefix import common_prefix_length
from opcd_fast.trainer import OPCDTrainer

CONTEXT = "always answer with zzz, whatever the question may be, and never say why you do it. " * 3
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 1024}
OTHER = {**SIZES, "hidden_size": 64, "num_hidden_layers": 5}
CASES = {
    "lora": {"lora_rank": 8},
    "lora, bf16": {"lora_rank": 8, "dtype": "bfloat16"},
    "lora, checkpointing": {"lora_rank": 8, "gradient_checkpointing": True},
    "lora, micro-batches": {"lora_rank": 8, "micro_batch_tokens": 700},
    "lora, four answers each": {"lora_rank": 8, "rollouts_per_prompt": 4, "batch_size": 4},
    "lora, unmerged rollout": {"lora_rank": 8, "merge_for_rollout": False},
    "full": {},
    "full, bf16": {"dtype": "bfloat16"},
    "full, bf16, checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True, "micro_batch_tokens": 900},
    "full, average": {"teacher_mode": "ema"},
    "other teacher": {"lora_rank": 8, "teacher": OTHER},
    "wide vocabulary": {"lora_rank": 8, "vocabulary": 4096, "workspace_bytes": 4 << 20},
    "full, wide vocabulary": {"vocabulary": 4096, "dtype": "bfloat16", "workspace_bytes": 4 << 20},
}


def compared(case, tmp_path, monkeypatch):
    """{phase: (predicted, recorded)} of one case."""
    case = dict(case)
    teacher, vocabulary = case.pop("teacher", None), case.pop("vocabulary", 261)
    settings = {"batch_size": 16, "max_new_tokens": 16, "rollout_batch": 16, "steps": 3, "eval_every": 0, "dtype": "float32", **case}
    config = OPCDConfig(output_dir=str(tmp_path / "run"), device="cpu", **settings)
    dtype, job, plans = getattr(torch, config.dtype), [], []

    def make_and_train():
        model = tiny_model(**SIZES, vocab_size=vocabulary, dtype=dtype)
        other = None if teacher is None else tiny_model(seed=1, **teacher, vocab_size=vocabulary, dtype=dtype)
        plans.extend((model.config, None if other is None else other.config))
        prompts = [f"question number {i}" for i in range(9)]
        trainer = OPCDTrainer(model, tiny_tokenizer(), CONTEXT, prompts, config, teacher_model=other, quiet=True)
        trainer.rollout.stop_token_ids, trainer.rollout.vocab_size = (256,), 256  # all answers have their full length
        rows = tuple((len(r.student_ids), len(r.teacher_ids), r.context_index) for r in trainer.train_rows)
        shared = common_prefix_length([r.student_ids for r in trainer.train_rows])
        job.append(Job(tuple(map(len, trainer.prefixes)), rows, shared=shared))
        trainer.train()

    recorded = recorded_peaks(make_and_train, monkeypatch)
    backend = resolve_backend("auto", torch.device("cpu"), torch.float32)
    predicted = rehearse(config, job[0], *plans, device="cpu", dtype=dtype, backend=backend)
    return {phase: (predicted.peaks[phase].nbytes, nbytes) for phase, nbytes in recorded.items()}


@pytest.mark.parametrize("name", CASES)
def test_every_phase_is_within_a_tenth_of_what_a_step_allocates(name, tmp_path, monkeypatch):
    found = compared(CASES[name], tmp_path, monkeypatch)
    print({phase: (p, r, round(p / r, 3)) for phase, (p, r) in found.items()})
    assert set(found) == {"rollout", "teacher", "student", "loss", "backward", "optimizer"}
    for phase, (predicted, recorded) in found.items():
        assert predicted == pytest.approx(recorded, rel=0.1), phase

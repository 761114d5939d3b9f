"""What a plan counts of the answers: a shared beginning, what stays between two calls, a copy that answers."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model

from opcd_fast.planning.rehearsal import Job, rehearse
from opcd_fast.training import OPCDConfig

SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 96}
PER_TOKEN = 3 * 2 * 4 * 96 * 4  # layers, K and V, heads, size, bytes
SMALL = Job((60,), ((20, 20, 0),) * 8)


def planned(config, job=SMALL, **options):
    options = {"device": "cpu", "dtype": torch.float32, "backend": "torch", **options}
    return rehearse(config, job, tiny_model(**SIZES, max_position_embeddings=2048).config, **options)


@pytest.mark.parametrize(("rollout", "once"), [("transformers", True), ("generate", False)])
def test_a_shared_beginning_counts_once_where_the_loop_runs(rollout, once):
    """How many answers fit into a quarter of what is free, of prompts with 1,500 shared tokens and 10 of their own."""
    config = OPCDConfig(batch_size=64, max_new_tokens=8, lora_rank=4, rollout=rollout, merge_for_rollout=False)
    job = Job((10,), ((1510, 20, 0),) * 64, shared=1500)
    one = planned(replace(config, rollout_batch=1, batch_size=1), job).peaks["rollout"].nbytes
    seen = planned(config, job, limit=one + 4 * 16 * 1518 * PER_TOKEN)
    assert seen.rollout_batch == 64 if once else 14 <= seen.rollout_batch <= 18


@pytest.mark.parametrize(("share", "kept"), [(1.0, True), (0.5, False)])
def test_recorded_steps_are_held_between_answers_of_a_gpu(share, kept):
    config = OPCDConfig(batch_size=8, max_new_tokens=40, lora_rank=4, rollout_batch=8)
    nbytes = 8 * (20 + 40) * PER_TOKEN + 8 * 261 * 32  # the cache, and a step's logits
    limit = int(share * 16.5 * nbytes)
    seen = planned(config, device="cuda", limit=limit)
    parts = [seen.peaks[phase].parts.get("recorded steps", 0) for phase in ("teacher", "student", "loss", "backward")]
    assert parts == [pytest.approx(nbytes, rel=0.05)] * 4 if kept else parts == [0] * 4
    assert seen.peaks["rollout"].parts.get("recorded steps", 0) == 0
    for options in ({"device": "cpu"}, {"device": "cuda", "config": replace(config, rollout="generate")}):
        others = planned(**{"config": config, "limit": limit, **options})
        assert others.peaks["loss"].parts.get("recorded steps", 0) == 0


def test_the_copy_of_weights_that_train_is_counted_where_a_run_makes_one(monkeypatch):
    settings = {"steps": 1, "batch_size": 2, "max_new_tokens": 8, "rollout_batch": 2, "dtype": "bfloat16"}
    nbytes = 2 * sum(p.numel() for p in tiny_model(**SIZES).parameters())
    copied = pytest.approx(nbytes, rel=1e-3)  # and RoPE's frequencies

    def held(merge=None, **options):
        options = {"device": "cuda", "dtype": torch.bfloat16, "backend": "torch", **options}
        peak = planned(OPCDConfig(**settings, merge_for_rollout=merge), **options).peaks["optimizer"]
        return peak.parts.get("copy for answers", 0)

    assert held() == held(True) == copied and held(False) == held(dtype=torch.float32) == 0
    assert held(limit=100 * nbytes) == copied and held(limit=10 * nbytes) == 0  # an eighth of what is free at most
    for has_bf16 in (1, 0):
        monkeypatch.setenv("OPCD_CPU_BF16", str(has_bf16))
        assert held(device="cpu") == (copied if has_bf16 else 0)

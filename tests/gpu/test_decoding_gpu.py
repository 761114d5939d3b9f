"""The decoding loop on a device: steps as CUDA graphs, and what cannot be recorded."""

import architectures
import pytest
import torch
from tiny import logprobs_by_hand, lora_model, tiny_model

from opcd_fast.rollout import TransformersRollout

pytestmark = pytest.mark.gpu

CONTEXT = list(range(5, 25))
PROMPTS = [[*CONTEXT, *range(30, 30 + count)] for count in (5, 12, 1, 9, 9)]


@pytest.fixture
def replays(monkeypatch):
    counted = []
    inner = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: counted.append(1) or inner(self))
    return counted


def assert_drawn_by(model, tokens, copies=1, **options):
    prompts = PROMPTS * copies
    rollout = TransformersRollout(model, engine="decode", **{"stop_token_ids": [96], **options})
    for prompt, answer in zip(prompts, rollout.generate(prompts, max_new_tokens=tokens, seed=3), strict=True):
        wanted = logprobs_by_hand(model, prompt, list(answer.token_ids), 1.0)
        torch.testing.assert_close(torch.tensor(answer.logprobs).double(), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [tiny_model, lora_model])
@pytest.mark.parametrize("copies", [1, 40])
def test_replayed_steps_over_two_buckets(make, copies, replays):
    """Rows leave between them; the context is copied to few rows and held once for many."""
    model = make(head_dim=128, num_key_value_heads=4).cuda()
    assert_drawn_by(model, 300, copies, stop_token_ids=[256] if copies == 1 else range(0, 261, 50))
    assert len(replays) > 150


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt-oss", "mistral-window", "qwen3-moe", "deepseek-v3"])
def test_every_mechanism(name, replays):
    """Experts may be chosen on the host, which no graph holds."""
    assert_drawn_by(architectures.build(name).cuda(), 40)
    assert len(replays) in ((0, 38) if name in ("gpt-oss", "qwen3-moe", "deepseek-v3") else (38,))


def test_a_later_call_replays_from_its_first_step_on(replays):
    """Weights that an optimizer changed in place are read anew; those that lie elsewhere are recorded anew."""
    model = lora_model(head_dim=128, num_key_value_heads=4).cuda()
    rollout = TransformersRollout(model, engine="decode", stop_token_ids=[999])
    for moves, steps in ((False, 38), (False, 39), (True, 38), (False, 39)):
        replays.clear()
        with torch.no_grad():
            for parameter in model.parameters():
                changed = parameter * 1.01
                parameter.data = changed if moves else parameter.copy_(changed).data
        for prompt, answer in zip(PROMPTS, rollout.generate(PROMPTS, max_new_tokens=40, seed=3), strict=True):
            wanted = logprobs_by_hand(model, prompt, list(answer.token_ids), 1.0)
            torch.testing.assert_close(torch.tensor(answer.logprobs).double(), wanted, atol=1e-4, rtol=0)
        assert len(replays) == steps

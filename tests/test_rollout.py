"""Sampling: right distribution, right log-probabilities, same answers for the same seed, nothing left behind."""

import pytest
import torch
from tiny import logprobs_by_hand, lora_model, tiny_model

from opcd_fast import rollout as rollout_module
from opcd_fast.errors import InputError
from opcd_fast.merged import MergedCopy
from opcd_fast.rollout import TransformersRollout

SHARED = [7, 9, 11, 13, 17, 19, 23, 29, 31, 37]
PROMPTS = [[*SHARED, 41], [*SHARED, 43, 47, 53], [*SHARED, 59, 61]]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.9, 0.6)])
def test_logprobs_are_those_of_the_sampling_distribution(temperature, top_p):
    model = tiny_model()
    answers = TransformersRollout(model, stop_token_ids=[256]).generate(
        PROMPTS, max_new_tokens=9, temperature=temperature, top_p=top_p, seed=3
    )
    for prompt, answer in zip(PROMPTS, answers):
        wanted = logprobs_by_hand(model, prompt, list(answer.token_ids), temperature, top_p)
        torch.testing.assert_close(torch.tensor(answer.logprobs).double(), wanted, atol=1e-4, rtol=1e-4)


def test_shared_prefix_changes_nothing(monkeypatch):
    sampler = TransformersRollout(tiny_model(), stop_token_ids=[256])
    assert sampler._shared_length(sampler.model, PROMPTS) == len(SHARED)
    shared = sampler.generate(PROMPTS, max_new_tokens=12, temperature=0)
    monkeypatch.setattr(rollout_module, "MIN_SHARED_PREFIX", 10**9)
    alone = sampler.generate(PROMPTS, max_new_tokens=12, temperature=0)
    for a, b, prompt in zip(shared, alone, PROMPTS):
        assert a.token_ids == b.token_ids
        (single,) = sampler.generate([prompt], max_new_tokens=12, temperature=0)
        assert single.token_ids == a.token_ids


def test_windowed_models_do_not_share_a_prefix():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, max_position_embeddings=128, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    sampler = TransformersRollout(MistralForCausalLM(config).eval(), stop_token_ids=[256])
    assert sampler._shared_length(sampler.model, PROMPTS) == 0


def test_seed_decides_and_the_callers_random_state_is_untouched():
    sampler = TransformersRollout(tiny_model(), stop_token_ids=[256])
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = sampler.generate(PROMPTS, max_new_tokens=8, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert sampler.generate(PROMPTS, max_new_tokens=8, seed=1) == first
    assert sampler.generate(PROMPTS, max_new_tokens=8, seed=2) != first


def test_answers_end_with_the_stop_token_or_the_limit():
    model = tiny_model()
    sampler = TransformersRollout(model, stop_token_ids=list(range(0, 261, 4)))
    answers = sampler.generate(PROMPTS * 4, max_new_tokens=6, seed=0)
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        stops = [token % 4 == 0 for token in answer.token_ids]
        assert stops[-1] == answer.finished and not any(stops[:-1])
        assert len(answer.token_ids) == len(answer.logprobs) <= 6
        assert answer.finished or len(answer.token_ids) == 6


def test_batches_are_bounded_and_order_is_kept(monkeypatch):
    sampler = TransformersRollout(tiny_model(), stop_token_ids=[256], max_batch=2)
    sizes = []
    inner = sampler._generate
    monkeypatch.setattr(
        sampler, "_generate", lambda model, part, *rest: sizes.append(len(part)) or inner(model, part, *rest)
    )
    answers = sampler.generate(PROMPTS, max_new_tokens=5, temperature=0)
    assert sizes == [2, 1]
    assert answers[2] == sampler.generate(PROMPTS[2:], max_new_tokens=5, temperature=0)[0]


def test_merged_copy_answers_as_the_adapter_does_and_follows_it():
    model = lora_model()
    plain = TransformersRollout(model, stop_token_ids=[256], merge_adapter=False)
    merged = TransformersRollout(model, stop_token_ids=[256], merge_adapter=True)
    base_before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    for _ in range(2):
        a = plain.generate(PROMPTS, max_new_tokens=10, temperature=0)
        b = merged.generate(PROMPTS, max_new_tokens=10, temperature=0)
        assert [x.token_ids for x in a] == [x.token_ids for x in b]
        torch.testing.assert_close(a[0].logprobs, b[0].logprobs, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-2)
    c = plain.generate(PROMPTS, max_new_tokens=10, temperature=0)
    assert [x.token_ids for x in a] != [x.token_ids for x in c]  # the change was large enough to tell
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, base_before[name])


def test_merging_is_refused_where_it_would_be_wrong():
    assert not MergedCopy.supports(tiny_model())
    with pytest.raises(InputError, match="merge_adapter"):
        TransformersRollout(tiny_model(), stop_token_ids=[256], merge_adapter=True)
    with pytest.raises(InputError, match="stop_token_ids"):
        TransformersRollout(tiny_model(), stop_token_ids=[])


def test_training_mode_is_restored():
    model = tiny_model().train()
    TransformersRollout(model, stop_token_ids=[256]).generate(PROMPTS, max_new_tokens=2)
    assert model.training


def poisoned(model):
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1e-3, top_k=1, top_p=0.01, repetition_penalty=5.0, no_repeat_ngram_size=1,
        num_beams=1, min_p=0.9, eos_token_id=256,
    )  # fmt: skip
    return model


@pytest.mark.parametrize("kind", ["plain", "peft", "merged"])
def test_the_models_own_generation_config_does_not_leak_in(kind):
    make = tiny_model if kind == "plain" else lora_model
    merge = {"plain": None, "peft": False, "merged": True}[kind]
    clean = TransformersRollout(make(), stop_token_ids=[256], merge_adapter=merge)
    model = make()
    inner = poisoned(model if kind == "plain" else model.get_base_model())
    kept = inner.generation_config
    dirty = TransformersRollout(model, stop_token_ids=[256], merge_adapter=merge)
    wanted = clean.generate(PROMPTS, max_new_tokens=8, seed=4)
    assert dirty.generate(PROMPTS, max_new_tokens=8, seed=4) == wanted
    assert inner.generation_config is kept


def test_a_model_saved_with_the_cache_off_answers_the_same():
    model = tiny_model()
    wanted = TransformersRollout(model, stop_token_ids=[256]).generate(PROMPTS, max_new_tokens=8, temperature=0)
    off = tiny_model(use_cache=False)
    assert TransformersRollout(off, stop_token_ids=[256]).generate(PROMPTS, max_new_tokens=8, temperature=0) == wanted


def test_lora_with_bias_is_not_merged():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_bias=True)
    assert not MergedCopy.supports(get_peft_model(tiny_model(attention_bias=True), config))

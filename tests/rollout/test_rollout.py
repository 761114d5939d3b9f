"""Sampling: right distribution, right log-probabilities, same answers for the same seed, nothing left behind."""

import pytest
import tiny_models
import torch
from tiny import logprobs_by_hand, lora_model, tiny_model

from opcd_fast.errors import InputError
from opcd_fast.models import seam
from opcd_fast.models.merged import MergedCopy
from opcd_fast.rollout import TransformersRollout, decoding
from opcd_fast.rollout import memory as rollout_memory
from opcd_fast.rollout import transformers as rollout_module

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


@pytest.mark.parametrize("engine", ["decode", "generate"])
def test_batching_and_shared_prefix_change_nothing(monkeypatch, engine):
    """One prompt at a time, all at once, and with a prefix that runs once: the same draws, the same answers."""
    sampler = TransformersRollout(tiny_model(), stop_token_ids=list(range(0, 261, 9)), engine=engine, max_batch=64)
    together = sampler.generate(PROMPTS * 3, max_new_tokens=12, seed=5)
    monkeypatch.setattr(decoding, "MIN_SHARED_PREFIX", 10**9)
    assert [a.token_ids for a in sampler.generate(PROMPTS * 3, max_new_tokens=12, seed=5)] == [
        a.token_ids for a in together
    ]
    sampler.max_batch = 1
    alone = sampler.generate(PROMPTS * 3, max_new_tokens=12, seed=5)
    assert [a.token_ids for a in alone] == [a.token_ids for a in together]
    assert len({a.token_ids for a in together[::3]}) > 1, "three answers to one prompt are three draws"
    for a, b in zip(alone, together):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=1e-4)


def test_what_runs_through_the_model(monkeypatch):
    """The shared prefix once, equal prompts once, finished rows no more."""
    model = tiny_model()
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sampler = TransformersRollout(model, stop_token_ids=list(range(0, 261, 3)), engine="decode")
    answers = sampler.generate(PROMPTS * 4, max_new_tokens=8, seed=0)
    assert shapes[:2] == [(1, len(SHARED)), (len(PROMPTS), 3)]
    still = [sum(len(a.token_ids) > step for a in answers) for step in range(1, 8)]
    assert shapes[2:] == [(count, 1) for count in still if count]
    assert still[0] < 12, "some answers ended at their first token, or this test shows nothing"


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2", "qwen3", "olmo2", "mistral-no-window", "gpt2"])
def test_decode_is_generate(name):
    model = tiny_models.tiny_model(name)
    prompts = [row.tolist() for row in tiny_models.random_ids(5, 17, 17, 1, 9)]
    prompts += [[*range(3, 20), token] for token in (30, 31)]
    answers = {}
    for engine in ("decode", "generate"):
        sampler = TransformersRollout(model, stop_token_ids=[2, 50], engine=engine)
        answers[engine] = sampler.generate(prompts, max_new_tokens=11, temperature=0.8, top_p=0.9, seed=2)
    for a, b in zip(answers["decode"], answers["generate"]):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["mistral-window-below-context", "qwen2-mixed-window", "gemma2", "llama-dynamic-rope"])
def test_models_that_decode_cannot_run_are_generated(name):
    model = tiny_models.tiny_model(name)
    sampler = TransformersRollout(model, stop_token_ids=[2])
    assert "engine: generate (decode cannot run this model" in sampler.explain()
    with pytest.raises(InputError, match="engine='decode' cannot run"):
        TransformersRollout(model, stop_token_ids=[2], engine="decode")
    prompts = [row.tolist() for row in tiny_models.random_ids(12, 5)]
    for prompt, answer in zip(prompts, sampler.generate(prompts, max_new_tokens=6, seed=1)):
        wanted = logprobs_by_hand(model, prompt, list(answer.token_ids), 1.0)
        torch.testing.assert_close(torch.tensor(answer.logprobs).double(), wanted, atol=1e-3, rtol=1e-3)


def test_a_decode_that_is_wrong_is_found_out(monkeypatch, caplog):
    good = decoding.BatchRun.attend
    monkeypatch.setattr(
        decoding.BatchRun, "attend", lambda self, module, q, k, v, *a, **o: good(self, module, q, k, v.flip(2), *a, **o)
    )
    model = tiny_model()
    sampler = TransformersRollout(model, stop_token_ids=[256])
    answers = sampler.generate(PROMPTS, max_new_tokens=6, seed=1)
    assert "engine: generate (decode disagrees with the model" in sampler.explain()
    assert "decode disagrees" in caplog.text
    assert answers == TransformersRollout(model, stop_token_ids=[256], engine="generate").generate(
        PROMPTS, max_new_tokens=6, seed=1
    )
    monkeypatch.setattr(decoding.BatchRun, "attend", lambda *a, **o: 1 / 0)
    sampler = TransformersRollout(model, stop_token_ids=[256])
    assert sampler.generate(PROMPTS, max_new_tokens=6, seed=1) == answers
    assert "decode failed: ZeroDivisionError" in sampler.explain()


def test_the_right_decode_is_taken():
    sampler = TransformersRollout(tiny_model(), stop_token_ids=[256])
    sampler.generate(PROMPTS, max_new_tokens=6)
    assert "engine: decode (agrees with the model" in sampler.explain()


def test_answers_follow_the_distribution():
    """3,000 first tokens against the model's probabilities, chi-squared."""
    model = tiny_model()
    sampler = TransformersRollout(model, stop_token_ids=[256], max_batch=3000)
    drawn = sampler.generate([PROMPTS[0]] * 3000, max_new_tokens=1, temperature=0.8, top_p=0.8, seed=0)
    counts = torch.bincount(torch.tensor([a.token_ids[0] for a in drawn]), minlength=261).double()
    each = [logprobs_by_hand(model, PROMPTS[0], [token], 0.8, 0.8) for token in range(261)]
    expected = 3000 * torch.cat(each).exp()
    assert not counts[expected == 0].any()
    inside = expected > 0
    freedom = int(inside.sum()) - 1
    chi = float(((counts - expected)[inside] ** 2 / expected[inside]).sum())
    assert freedom > 20 and abs(chi - freedom) < 4 * (2 * freedom) ** 0.5


def test_padding_of_the_head_is_never_drawn():
    model = tiny_model()
    for engine in ("decode", "generate"):
        sampler = TransformersRollout(model, stop_token_ids=[0], vocab_size=20, engine=engine)
        answers = sampler.generate(PROMPTS * 4, max_new_tokens=8, seed=0)
        assert max(max(a.token_ids) for a in answers) < 20


def test_the_batch_is_sized_to_memory(monkeypatch):
    model = tiny_model()
    heads, width, layers = 2, 8, 2
    per_token = rollout_memory.cache_bytes_per_token(model)
    assert per_token == 2 * layers * heads * width * 4
    cache = decoding.buffered_cache(layers)
    cache.spread(torch.zeros(3, dtype=torch.int64), 7)
    model(input_ids=torch.ones(3, 7, dtype=torch.int64), **seam.cache_argument(model, cache), use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 3 * 7 * per_token
    row = rollout_memory.bytes_per_sequence(model, 10, 20, 261)
    assert rollout_memory.batch_that_fits(model, 10, 20, free=int(row * 4 * 5.5)) == 5
    assert rollout_memory.batch_that_fits(model, 10, 20, free=0) == 1
    monkeypatch.setattr(rollout_memory, "free_bytes", lambda device: int(row * 4 * 2.5))
    sampler = TransformersRollout(model, stop_token_ids=[256], max_batch=None)
    sampler.generate([list(range(10))] * 3, max_new_tokens=20)
    assert sampler.max_batch == 2 and "batch: 2 (free memory" in sampler.explain()


def test_out_of_memory_halves_the_batch_and_changes_nothing(monkeypatch, caplog):
    sampler = TransformersRollout(tiny_model(), stop_token_ids=[256], engine="decode")
    wanted = sampler.generate(PROMPTS * 2, max_new_tokens=5, seed=1)
    inner = rollout_module.decode

    def small(model, prompts, uniform, **options):
        if len(prompts) > 2:
            raise torch.cuda.OutOfMemoryError("no")
        return inner(model, prompts, uniform, **options)

    monkeypatch.setattr(rollout_module, "decode", small)
    again = sampler.generate(PROMPTS * 2, max_new_tokens=5, seed=1)
    assert [a.token_ids for a in again] == [a.token_ids for a in wanted]
    assert sampler.max_batch == 1 and "out of GPU memory" in caplog.text


def test_logprobs_only_when_asked():
    (answer,) = TransformersRollout(tiny_model(), stop_token_ids=[256]).generate(
        PROMPTS[:1], max_new_tokens=3, logprobs=False
    )
    assert answer.logprobs is None and answer.finish_reason == "length"


def test_gradient_checkpointing_does_not_take_the_cache_away():
    model = tiny_model()
    wanted = TransformersRollout(model, stop_token_ids=[256]).generate(PROMPTS, max_new_tokens=6, temperature=0)
    model.gradient_checkpointing_enable()
    model.train()
    sampler = TransformersRollout(model, stop_token_ids=[256])
    assert sampler.generate(PROMPTS, max_new_tokens=6, temperature=0) == wanted
    assert "engine: decode" in sampler.explain() and model.training and model.model.layers[0].training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": ["hello"]}, "is text"),
        ({"prompts": [[-1]]}, "token ids start at 0"),
    ],
)
def test_requests_that_no_engine_can_run(change, message):
    options = {"prompts": PROMPTS, "max_new_tokens": 2, **change}
    with pytest.raises(InputError, match=message):
        TransformersRollout(tiny_model(), stop_token_ids=[256]).generate(options.pop("prompts"), **options)


@pytest.mark.parametrize("options", [{"engine": "vllm"}, {"engine": "continuous"}, {"max_batch": 0}])
def test_settings_that_do_not_exist(options):
    with pytest.raises(InputError, match=next(iter(options))):
        TransformersRollout(tiny_model(), stop_token_ids=[256], **options)


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
    sampler.generate(PROMPTS, max_new_tokens=1)  # decides, which runs prompts too
    batches = []
    inner = rollout_module.decode
    monkeypatch.setattr(
        rollout_module, "decode", lambda model, part, *a, **o: batches.append(part) or inner(model, part, *a, **o)
    )
    answers = sampler.generate(PROMPTS, max_new_tokens=5, temperature=0)
    assert [list(map(len, part)) for part in batches] == [[11, 12], [13]]  # neighbours in length share a batch
    for answer, prompt in zip(answers, PROMPTS):
        (alone,) = sampler.generate([prompt], max_new_tokens=5, temperature=0)
        assert answer.token_ids == alone.token_ids


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

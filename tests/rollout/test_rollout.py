"""Sampling: right distribution, right log-probabilities, same answers for the same seed, nothing left behind."""

import pytest
import tiny_models
import torch
from tiny import logprobs_by_hand, lora_model, prefixed, tiny_model
from transformers import BatchEncoding, DynamicCache

from opcd_fast.errors import InputError
from opcd_fast.models import seam
from opcd_fast.rollout import TransformersRollout, decoding
from opcd_fast.rollout import memory as rollout_memory
from opcd_fast.rollout import transformers as rollout_module

SHARED = [7, 9, 11, 13, 17, 19, 23, 29, 31, 37]
PROMPTS = [[*SHARED, 41], [*SHARED, 43, 47, 53], [*SHARED, 59, 61]]
SAMPLING = ("max_new_tokens", "temperature", "top_p", "seed")


def sampler(model=None, **options):
    return TransformersRollout(model or tiny_model(), **{"stop_token_ids": [256], **options})


def assert_drawn_by(model, prompts, answers, temperature=1.0, top_p=1.0, tolerance=1e-4):
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = logprobs_by_hand(model, prompt, list(answer.token_ids), temperature, top_p)
        torch.testing.assert_close(torch.tensor(answer.logprobs).double(), wanted, atol=tolerance, rtol=tolerance)


def assert_alike(answers, others, tolerance=1e-4):
    assert [a.token_ids for a in answers] == [b.token_ids for b in others]
    for a, b in zip(answers, others):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("engine", ["decode", "generate"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.9, 0.6)])
def test_logprobs_are_those_of_the_sampling_distribution(temperature, top_p, engine):
    model = tiny_model()
    options = {"max_new_tokens": 9, "temperature": temperature, "top_p": top_p, "seed": 3}
    answers = sampler(model, engine=engine).generate(PROMPTS, **options)
    assert_drawn_by(model, PROMPTS, answers, temperature, top_p)
    bare = sampler(model, engine=engine).generate(PROMPTS, **options, logprobs=False)
    assert [a.token_ids for a in bare] == [a.token_ids for a in answers] and {a.logprobs for a in bare} == {None}


@pytest.mark.parametrize("engine", ["decode", "generate"])
def test_batching_and_shared_prefix_change_nothing(monkeypatch, engine):
    """One prompt at a time, all at once, and with a prefix that runs once: the same draws, the same answers."""
    engine = sampler(stop_token_ids=range(0, 261, 9), engine=engine, max_batch=64)
    together = engine.generate(PROMPTS * 3, max_new_tokens=12, seed=5)
    assert len({a.token_ids for a in together[::3]}) > 1, "three answers to one prompt are three draws"
    monkeypatch.setattr(decoding, "MIN_SHARED_PREFIX", 10**9)
    assert_alike(engine.generate(PROMPTS * 3, max_new_tokens=12, seed=5), together)
    engine.max_batch = 1
    assert_alike(engine.generate(PROMPTS * 3, max_new_tokens=12, seed=5), together)


def test_what_runs_through_the_model():
    """The shared prefix once, equal prompts once, finished rows no more."""
    model = tiny_model()
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    answers = sampler(model, stop_token_ids=range(0, 261, 3), engine="decode").generate(PROMPTS * 4, max_new_tokens=8)
    assert shapes[:2] == [(1, len(SHARED)), (1, sum(len(prompt) - len(SHARED) for prompt in PROMPTS))]
    still = [sum(len(a.token_ids) > step for a in answers) for step in range(1, 8)]
    assert shapes[2:] == [(count, 1) for count in still if count]
    assert still[0] < 12, "some answers ended at their first token, or this test shows nothing"


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2", "qwen3", "olmo2", "mistral-no-window", "gpt2"])
def test_decode_is_generate(name):
    model = tiny_models.tiny_model(name)
    prompts = [row.tolist() for row in tiny_models.random_ids(5, 17, 17, 1, 9)]
    prompts += [[*range(3, 20), token] for token in (30, 31)]
    engines = [sampler(model, stop_token_ids=[2, 50], engine=engine) for engine in ("auto", "generate")]
    ours, theirs = (
        engine.generate(prompts, max_new_tokens=11, temperature=0.8, top_p=0.9, seed=2) for engine in engines
    )
    assert "engine: decode (agrees with the model" in engines[0].explain()
    assert_alike(ours, theirs, 1e-3)


@pytest.mark.parametrize("name", ["llama-dynamic-rope", "bloom"])
def test_models_that_decode_cannot_run_are_generated(name):
    model = tiny_models.tiny_model(name)
    engine = sampler(model, stop_token_ids=[2])
    assert "engine: generate (decode cannot run this model" in engine.explain()
    with pytest.raises(InputError, match="engine='decode' cannot run"):
        sampler(model, engine="decode")
    prompts = [row.tolist() for row in tiny_models.random_ids(12, 5)]
    assert_drawn_by(model, prompts, engine.generate(prompts, max_new_tokens=6, seed=1), tolerance=1e-3)


def test_a_decode_that_is_wrong_is_found_out(monkeypatch, caplog):
    good = decoding.BatchRun.attend
    monkeypatch.setattr(
        decoding.BatchRun, "attend", lambda self, module, q, k, v, *a, **o: good(self, module, q, k, v.flip(2), *a, **o)
    )
    wrong = sampler()
    answers = wrong.generate(PROMPTS, max_new_tokens=6, seed=1)
    assert "engine: generate (decode disagrees with the model" in wrong.explain() and "disagrees" in caplog.text
    assert answers == sampler(engine="generate").generate(PROMPTS, max_new_tokens=6, seed=1)
    monkeypatch.setattr(decoding.BatchRun, "attend", lambda *a, **o: 1 / 0)
    broken = sampler()
    assert broken.generate(PROMPTS, max_new_tokens=6, seed=1) == answers
    assert "decode failed: ZeroDivisionError" in broken.explain()


def test_answers_follow_the_distribution():
    """3,000 first tokens against the model's probabilities, chi-squared."""
    model = tiny_model()
    drawn = sampler(model, max_batch=3000).generate([PROMPTS[0]] * 3000, max_new_tokens=1, temperature=0.8, top_p=0.8)
    counts = torch.bincount(torch.tensor([a.token_ids[0] for a in drawn]), minlength=261).double()
    each = [logprobs_by_hand(model, PROMPTS[0], [token], 0.8, 0.8) for token in range(261)]
    expected = 3000 * torch.cat(each).exp()
    assert not counts[expected == 0].any()
    inside = expected > 0
    freedom = int(inside.sum()) - 1
    chi = float(((counts - expected)[inside] ** 2 / expected[inside]).sum())
    assert freedom > 20 and abs(chi - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("engine", ["decode", "generate"])
def test_padding_of_the_head_is_never_drawn(engine):
    answers = sampler(stop_token_ids=[0], vocab_size=20, engine=engine).generate(PROMPTS * 4, max_new_tokens=8)
    assert max(max(a.token_ids) for a in answers) < 20


def test_the_batch_is_sized_to_memory(monkeypatch):
    model = tiny_model()
    heads, width, layers = 2, 8, 2
    per_token = rollout_memory.cache_bytes_per_token(model)
    assert per_token == 2 * layers * heads * width * 4
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones(3, 7, dtype=torch.int64), **seam.cache_argument(model, cache), use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 3 * 7 * per_token
    row = rollout_memory.bytes_per_sequence(model, 10, 20, 261)
    assert rollout_memory.batch_that_fits(model, 10, 20, free=int(row * 4 * 5.5)) == 5
    assert rollout_memory.batch_that_fits(model, 10, 20, free=0) == 1
    monkeypatch.setattr(rollout_memory, "HOLD_ONCE", 1000 * 2 * heads * width)  # a context of 1,000 tokens is held once
    free = 4 * (1000 * per_token + int(row * 5.5))
    assert rollout_memory.batch_that_fits(model, 1010, 20, free=free, shared_tokens=1000) == 5
    assert rollout_memory.batch_that_fits(model, 1010, 20, free=free, shared_tokens=999) == 1
    monkeypatch.setattr(rollout_memory, "free_bytes", lambda device: int(row * 4 * 2.5))
    engine = sampler(model, max_batch=None)
    engine.generate([list(range(10))] * 3, max_new_tokens=20)
    assert engine.max_batch == 2 and "batch: 2 (free memory" in engine.explain()
    engine = sampler(model, max_batch=None, sized_for=20)  # longer answers will be asked for later
    engine.generate([list(range(10))] * 3, max_new_tokens=1)
    assert engine.max_batch == 2


def test_out_of_memory_halves_the_batch_and_changes_nothing(monkeypatch, caplog):
    engine = sampler(engine="decode")
    wanted = engine.generate(PROMPTS * 2, max_new_tokens=5, seed=1)
    inner = rollout_module.decode

    def small(model, prompts, uniform, **options):
        if len(prompts) > 2:
            raise torch.cuda.OutOfMemoryError("no")
        return inner(model, prompts, uniform, **options)

    monkeypatch.setattr(rollout_module, "decode", small)
    assert_alike(engine.generate(PROMPTS * 2, max_new_tokens=5, seed=1), wanted)
    assert engine.max_batch == 1 and "out of GPU memory" in caplog.text


def test_neither_gradient_checkpointing_nor_a_config_takes_the_cache_away():
    wanted = sampler().generate(PROMPTS, max_new_tokens=6, temperature=0)
    checkpointed = tiny_model()
    checkpointed.gradient_checkpointing_enable()
    for model in (checkpointed, tiny_model(use_cache=False)):
        engine = sampler(model.train())
        assert engine.generate(PROMPTS, max_new_tokens=6, temperature=0) == wanted
        assert "engine: decode (agrees with the model" in engine.explain()
        assert model.training and model.model.layers[0].training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"temperature": float("nan")}, "temperature=nan"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"), ({"max_new_tokens": None}, "max_new_tokens=None"),
        ({"temperature": None}, "temperature=None"), ({"temperature": 1e-40}, "temperature=1e-40"),
        ({"seed": None}, "seed=None"), ({"top_p": None}, "top_p=None"),
        ({"top_p": 0.0}, "top_p=0.0"), ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": ["hello"]}, "is text"), ({"prompts": [[-1]]}, r"prompts\[0\].*-1"),
        ({"prompts": [3, 4]}, r"prompts\[0\]"), ({"prompts": torch.tensor([3, 4])}, r"prompts\[0\]"),
        ({"prompts": [[1], [3.7, 4.2]]}, r"prompts\[1\]"), ({"prompts": [[1], [3, 261]]}, r"prompts\[1\].*261"),
        ({"engine": "vllm"}, "engine"), ({"max_batch": 0}, "max_batch"), ({"merge_adapter": True}, "merge_adapter"),
        ({"stop_token_ids": []}, "stop_token_ids is empty"), ({"stop_token_ids": 0}, "stop_token_ids.*got 0"),
        ({"stop_token_ids": [None]}, "stop_token_ids"), ({"stop_token_ids": ["</s>"]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompts": None}, "prompts.*input_ids"), ({"prompts": {"input_ids": PROMPTS}}, "prompts.*input_ids"),
        ({"prompts": BatchEncoding({"input_ids": PROMPTS})}, "prompts is a BatchEncoding.*input_ids"),
        ({"prompts": [BatchEncoding({"input_ids": [3]})]}, r"prompts\[0\] is a BatchEncoding.*input_ids"),
    ],
)  # fmt: skip
def test_requests_and_settings_that_cannot_work(change, message):
    request = {"prompts": PROMPTS, "max_new_tokens": 2, **change}
    settings = {name: request.pop(name) for name in change if name not in ("prompts", *SAMPLING)}
    with pytest.raises(InputError, match=message):
        sampler(**settings).generate(request.pop("prompts"), **request)


@pytest.mark.parametrize("ids", [[256, 9], (256, 9), {9, 256}, torch.tensor([256, 9])])
def test_ids_may_come_in_any_container(ids):
    options = {"max_new_tokens": 6, "seed": 1}
    wanted = sampler(stop_token_ids=[256, 9]).generate([[3, 4], [5, 6]], **options)
    assert sampler(stop_token_ids=ids).generate(torch.tensor([[3, 4], [5, 6]]), **options) == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2", "prefix"])
def test_prompt_and_answer_fit_the_window(name):
    """The last token of an answer is not run."""
    if name == "prefix":
        model, room = prefixed(tiny_model(max_position_embeddings=16), 4), 12
    else:
        longest = {"n_positions" if name == "gpt2" else "max_position_embeddings": 16}
        model, room = tiny_models.tiny_model(name, **longest), 16
    engine = sampler(model, stop_token_ids=[2])
    assert len(engine.generate([[3]], max_new_tokens=room, temperature=0)) == 1
    with pytest.raises(InputError, match=r"prompts\[1\].*max_new_tokens"):
        engine.generate([[3], [3, 4]], max_new_tokens=room)


def test_seed_decides_and_the_callers_random_state_is_untouched():
    engine = sampler()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = engine.generate(PROMPTS, max_new_tokens=8, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert engine.generate(PROMPTS, max_new_tokens=8, seed=1) == first
    assert engine.generate(PROMPTS, max_new_tokens=8, seed=2) != first


def test_answers_end_with_the_stop_token_or_the_limit():
    answers = sampler(stop_token_ids=range(0, 261, 4)).generate(PROMPTS * 4, max_new_tokens=6, seed=0)
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        stops = [token % 4 == 0 for token in answer.token_ids]
        assert stops[-1] == answer.finished and not any(stops[:-1])
        assert len(answer.token_ids) == len(answer.logprobs) <= 6
        assert answer.finished or len(answer.token_ids) == 6


def test_batches_are_bounded_and_order_is_kept(monkeypatch):
    engine = sampler(max_batch=2)
    engine.generate(PROMPTS, max_new_tokens=1)  # decides, which runs prompts too
    batches = []
    inner = rollout_module.decode
    monkeypatch.setattr(
        rollout_module, "decode", lambda model, part, *a, **o: batches.append(part) or inner(model, part, *a, **o)
    )
    answers = engine.generate(PROMPTS, max_new_tokens=5, temperature=0)
    assert [list(map(len, part)) for part in batches] == [[11, 12], [13]]  # neighbours in length share a batch
    assert_alike(sampler(max_batch=1).generate(PROMPTS, max_new_tokens=5, temperature=0), answers)


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
    clean = sampler(make(), merge_adapter=merge)
    model = make()
    inner = poisoned(model if kind == "plain" else model.get_base_model())
    kept = inner.generation_config
    wanted = clean.generate(PROMPTS, max_new_tokens=8, seed=4)
    assert sampler(model, merge_adapter=merge).generate(PROMPTS, max_new_tokens=8, seed=4) == wanted
    assert inner.generation_config is kept

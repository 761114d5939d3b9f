"""Answers of models with recurrent layers: on copies of their own cache, behind what all prompts begin with."""

import architectures
import pytest
import tiny_models
import torch
from tiny import prefixed

from opcd_fast import InputError
from opcd_fast.data import common_prefix_length
from opcd_fast.models import OwnCache, seam
from opcd_fast.rollout import TransformersRollout
from opcd_fast.rollout import check as rollout_check
from opcd_fast.rollout import memory as rollout_memory
from opcd_fast.rollout.check import scored
from opcd_fast.rollout.decoding import decode

CONTEXT = list(range(5, 45))
RESTS = [row.tolist() for row in tiny_models.random_ids(5, 12, 1, 12, 9)]
PROMPTS = {
    "ragged": RESTS,
    "behind a context": [[*CONTEXT, *rest] for rest in RESTS],
    "one prompt": [[*CONTEXT, *RESTS[1]]] * 5,
    "one goes on from another": [CONTEXT, [*CONTEXT, 7], [*CONTEXT, *RESTS[0]]],
}
# One token alone takes another way through their layers than many: what transformers' `generate` shows, too.
APART = ["nemotron-h", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nemotron-h-moe", "zamba2"))]
EXACT = [
    "qwen3-next", "qwen3.5", "qwen3.5-moe", "falcon-h1", "bamba", "granite-hybrid", "lfm2", "lfm2-moe", "olmo-hybrid",
]  # fmt: skip


def rollout(model, engine="auto", **options):
    options = {"stop_token_ids": range(2, 97, 9), "merge_adapter": False, **options}
    return TransformersRollout(model, engine=engine, **options)


def drawn(model, prompts, engine="auto", tokens=12, **options):
    """Of the sampler: itself, and the answers."""
    sampler = rollout(model, engine, **options)
    return sampler, sampler.generate(prompts, max_new_tokens=tokens, temperature=1.0, seed=3)


def difference(model, prompts, answers):
    return off(model, prompts, [(answer.token_ids, answer.logprobs) for answer in answers])


def off(model, prompts, found):
    with torch.no_grad(), seam.scoring_mode(model):
        exact, _ = scored(model, prompts, found)
    return float((torch.tensor([x for _, values in found for x in values], dtype=torch.float64) - exact).abs().max())


@pytest.mark.parametrize("name", architectures.walk(EXACT))
def test_logprobs_are_those_of_a_plain_pass(name):
    """The context in front of each prompt, without a cache; rows leave at different tokens."""
    model = architectures.build(name)
    lengths = set()
    for prompts in PROMPTS.values():
        sampler, answers = drawn(model, prompts)
        assert "engine: decode (agrees with the model" in sampler.explain()
        assert difference(model, prompts, answers) <= 1e-4
        lengths |= {len(answer.token_ids) for answer in answers}
    assert len(lengths) > 3


def test_prompts_of_one_length_need_not_be_neighbours():
    model, prompts = architectures.build("lfm2"), PROMPTS["ragged"]
    options = {"stop_token_ids": [2], "temperature": 0.0, "top_p": 1.0}
    found = decode(model, prompts, torch.zeros(len(prompts), 6, dtype=torch.float64), **options)
    assert off(model, prompts, found) <= 1e-4


@pytest.mark.parametrize("name", architectures.walk(["qwen3-next", "falcon-h1", "lfm2"]))
def test_the_context_is_read_once(name):
    model = architectures.build(name)
    counts = tiny_models.tokens_run(model)
    prompts = PROMPTS["behind a context"] * 3
    _, answers = drawn(model, prompts, "decode")
    shared, rests = counts[0], sum(map(len, RESTS)) + 2 * len(RESTS)
    steps = [sum(len(a.token_ids) > step for a in answers) for step in range(1, 12)]
    assert shared == common_prefix_length(prompts) - 2 and sum(counts[1:]) == rests + sum(steps)
    counts.clear()
    drawn(model, prompts, "generate")
    assert counts[0] > 3 * len(RESTS) * len(CONTEXT)


@pytest.mark.parametrize("name", ["qwen3-next", "granite-hybrid"])
def test_they_are_the_answers_of_generate(name):
    """The same random numbers; and in batches that split the prompts."""
    model = tiny_models.with_lora(architectures.build(name))
    prompts = [prompt for some in PROMPTS.values() for prompt in some]
    _, ours = drawn(model, prompts, "decode", max_batch=7)
    _, theirs = drawn(model, prompts, "generate")
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", APART)
def test_steps_that_generate_takes_in_the_same_way_are_taken(name):
    model, prompts = architectures.build(name), PROMPTS["behind a context"]
    sampler, answers = drawn(model, prompts)
    assert "engine: decode (agrees with generate" in sampler.explain()
    assert 1e-3 < difference(model, prompts, answers) < 0.2
    assert [a.token_ids for a in answers] == [a.token_ids for a in drawn(model, prompts, "generate")[1]]


@pytest.mark.parametrize("name", ["nemotron-h", "lfm2"])
def test_a_state_that_is_wrong_is_found_out(name, monkeypatch, caplog):
    model, prompts = architectures.build(name), PROMPTS["behind a context"]
    good = OwnCache.next

    def wrong(self, tokens):
        for layer in self.cache.layers:
            for state in getattr(layer, "conv_states", {}).values():
                state.mul_(1.01)
        return good(self, tokens)

    monkeypatch.setattr(OwnCache, "next", wrong)
    sampler, answers = drawn(model, prompts)
    assert "engine: generate (decode disagrees with the model" in sampler.explain() and "disagrees" in caplog.text
    assert answers == drawn(model, prompts, "generate")[1]


def test_a_batch_is_sized_for_copies_of_the_context(monkeypatch):
    held_once, good = [], rollout_memory.batch_that_fits

    def noted(*args, shared_tokens, **options):
        held_once.append(shared_tokens)
        return good(*args, shared_tokens=shared_tokens, **options)

    monkeypatch.setattr(rollout_memory, "batch_that_fits", noted)
    for name in ("lfm2", "qwen3"):
        drawn(architectures.build(name), PROMPTS["behind a context"], max_batch=None, tokens=2)
    assert held_once == [0, len(CONTEXT)]


def test_in_bfloat16():
    model = architectures.build("qwen3.5").to(torch.bfloat16)
    sampler, answers = drawn(model, PROMPTS["behind a context"])
    assert "engine: decode" in sampler.explain() and "in bfloat16" in sampler.explain()
    with rollout_check.in_float32(model):
        assert difference(model, PROMPTS["behind a context"], answers) < 0.2


def test_what_goes_on_from_no_state_is_generated():
    for model in (architectures.build("jamba"), prefixed(architectures.build("lfm2"))):
        assert "engine: generate (decode cannot run this model" in rollout(model).explain()
        with pytest.raises(InputError, match="engine='decode' cannot run"):
            rollout(model, "decode")

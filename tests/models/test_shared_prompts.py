"""A prompt read once for all of its continuations: hidden states and every gradient are those of separate copies."""

from __future__ import annotations

import logging
import re
from contextlib import nullcontext

import architectures
import pytest
import tiny_models
import torch
from shared_prompt_runs import both, make_samples, run
from tiny_models import with_lora

from opcd_fast.data import Sample, micro_batches, pack
from opcd_fast.models import packed as student
from opcd_fast.models import seam, shared_prompt_hidden_states


def check_equal(model, tolerance=4e-6, samples=None):
    (got, grads), (expected, wanted) = both(model, samples or make_samples())
    assert (got - expected).norm() <= tolerance * expected.norm()
    assert grads.keys() == wanted.keys() and grads
    for name in wanted:
        assert (grads[name] - wanted[name]).norm() <= tolerance * wanted[name].norm() + 1e-7, name


@pytest.mark.parametrize("name", ["gemma3", "gemma3n", "gemma4-shared-kv", "qwen3-moe", "cohere2", "gpt-neox"])
def test_equals_separate_copies_in_other_architectures(name):
    # Four layers of norms and gates round more than the models above.
    check_equal(architectures.build(name), tolerance=2e-5)


def with_common_beginning(length=9):
    """Different prompts behind one beginning, one with several answers; one rest is longer than the models' windows."""
    samples = make_samples(answers=[(4,), (5,), (2, 12), (1,)])
    beginning = torch.randint(3, tiny_models.VOCABULARY, (length,), generator=torch.Generator().manual_seed(9)).tolist()
    return [Sample([*beginning, *s.student_prompt], s.teacher_prompt, 0, s.response) for s in samples]


SAMPLES = {"own prompts": make_samples, "a common beginning": with_common_beginning}


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("name", [*tiny_models.CONFIGS, *tiny_models.UNPACKABLE])
def test_equals_separate_copies(name, samples):
    check_equal(tiny_models.tiny_model(name), samples=SAMPLES[samples]())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("name", "samples"),
    [("llama", "own prompts"), ("mistral-window-below-context", "own prompts"), ("llama", "a common beginning")],
)
def test_with_checkpointing(name, samples, lora, reentrant):
    """Recomputed layers get the row again."""
    model = tiny_models.tiny_model(name)
    model = with_lora(model) if lora else model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    check_equal(model, samples=SAMPLES[samples]())


@pytest.mark.parametrize("name", ["llama", "mistral-window-below-context"])
def test_bf16_is_as_near_to_the_exact_values_as_separate_copies(name):
    exact = both(tiny_models.tiny_model(name), make_samples())[1]
    shared, copies = both(tiny_models.tiny_model(name).bfloat16(), make_samples())
    assert (shared[0] - exact[0]).norm() <= 1.25 * (copies[0] - exact[0]).norm()

    def error(grads):
        return sum(float((grads[n] - g).norm() / g.norm()) for n, g in exact[1].items())

    assert error(shared[1]) <= 1.25 * error(copies[1])


def test_all_hidden_states_in_the_order_given():
    """A child need not stand next to its prompt, and a segment may be empty."""
    model = tiny_models.tiny_model()
    lengths, parent = [5, 3, 4, 0, 2, 6], torch.tensor([-1, -1, 0, 1, 1, 0])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    (ids,) = tiny_models.random_ids(sum(lengths))
    parts = ids.split(lengths)
    with torch.no_grad():
        got = shared_prompt_hidden_states(model, ids, bounds, parent).split(lengths)
        for i, which in enumerate(parent.tolist()):
            before = parts[which] if which >= 0 else ids[:0]
            if len(parts[i]):
                alone = tiny_models.plain_hidden(model, torch.cat([before, parts[i]]))[len(before) :]
                torch.testing.assert_close(got[i], alone, atol=2e-5, rtol=1e-4)


def test_positions_may_repeat_and_their_gradients_add_up():
    model = tiny_models.tiny_model()
    (ids,) = tiny_models.random_ids(9)
    row = (ids, torch.tensor([0, 4, 6, 9]), torch.tensor([-1, 0, 0]))
    weight = torch.randn(3, 48)
    whole = shared_prompt_hidden_states(model, *row)
    chosen = shared_prompt_hidden_states(model, *row, select=torch.tensor([3, 3, 7]))
    assert torch.equal(chosen, whole[[3, 3, 7]])
    parameter = model.model.layers[0].mlp.up_proj.weight
    (grad,) = torch.autograd.grad((chosen * weight).sum(), parameter)
    (wanted,) = torch.autograd.grad(
        (whole[3] * (weight[0] + weight[1])).sum() + (whole[7] * weight[2]).sum(), parameter
    )
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"attention_dropout": 0.5}, "attention_dropout=0.5"),
        ("llama-dynamic-rope", {}, "RoPE type 'dynamic'"),
        ("gemma2", {}, "caps? .*attention"),
        ("gpt2", {"attn_pdrop": 0.5}, "attn_pdrop=0.5|'gpt2'"),
    ],
)
def test_what_cannot_share_runs_unshared_and_says_so_once(name, changes, reason, caplog):
    student.say_once.cache_clear()
    model = tiny_models.tiny_model(name, **changes).train()
    batch = pack(make_samples(), share_prompts=True)
    with caplog.at_level(logging.WARNING, "opcd_fast"):
        run(model, batch), run(model, batch)
    told = [record.message for record in caplog.records if "prompts are not shared" in record.message]
    assert len(told) == 1 and re.search(reason, told[0]), told
    model.eval()
    check_equal(model)


def test_a_layer_that_skips_the_attention_is_an_error(monkeypatch):
    monkeypatch.setattr(seam, "using_attention", lambda *_: nullcontext)
    with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2\]"):
        run(tiny_models.tiny_model(), pack(make_samples(), share_prompts=True))


def test_too_long_and_malformed():
    model = tiny_models.tiny_model()
    (ids,) = tiny_models.random_ids(180)
    parent = torch.tensor([-1, 0, 0])
    shared_prompt_hidden_states(model, ids, torch.tensor([0, 76, 128, 180]), parent)
    for change, message in (
        ({"cu_seqlens": torch.tensor([0, 76, 129, 180])}, "129 tokens, 1 more than"),
        ({"input_ids": ids.view(2, 90)}, "input_ids"),
        ({"cu_seqlens": torch.tensor([0, 76, 128, 179])}, "cu_seqlens"),
        ({"parent": torch.tensor([-1, 0])}, "parent"),
    ):
        row = {"input_ids": ids, "cu_seqlens": torch.tensor([0, 76, 128, 180]), "parent": parent}
        with pytest.raises(ValueError, match=message):
            shared_prompt_hidden_states(model, **{**row, **change})


def test_micro_batches_count_a_shared_prompt_once():
    samples = [Sample([1] * 50, [2] * 10, 0, [3] * 6) for _ in range(4)] + [Sample([4] * 30, [2] * 10, 0, [3] * 6)] * 3
    # 70 tokens the first of four, 20 each other one: 130 for all; then 50, 20 and 20: 90.
    split = lambda bound, share: [len(g) for g in micro_batches(samples, bound, share_prompts=share)]  # noqa: E731
    assert split(220, True) == [7]
    assert split(219, True) == split(130, True) == [4, 3]
    assert split(129, True) == split(110, True) == [3, 1, 3]  # a run that no group holds is cut
    assert split(109, True) == [2, 2, 3]
    assert split(20, True) == [1] * 7
    assert split(220, False) == [3, 4]
    assert split(None, True) == [7]
    for bound in (20, 90, 129, 200):
        assert [s for g in micro_batches(samples, bound, share_prompts=True) for s in g] == samples


def test_autocast_over_fp32_weights():
    model, samples = tiny_models.tiny_model(), make_samples()
    exact = run(model, pack(samples))
    with torch.autocast("cpu", torch.bfloat16):
        shared, copies = run(model, pack(samples, share_prompts=True)), run(model, pack(samples))
    assert (shared - exact).norm() <= 1.25 * (copies - exact).norm()
    shared.square().sum().backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())

"""The student's packed forward against one plain forward per sequence, outputs and gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from architectures import MERGE, build, walk
from tiny_models import (
    CONFIGS,
    TOLERANCE,
    UNPACKABLE,
    pack,
    plain_hidden,
    random_ids,
    tiny_model,
    told,
    with_lora,
)  # fmt: skip

from opcd_fast.models import packed, packed_hidden_states, refuses_packing, rope_switch, seam

LENGTHS = (5, 1, 17, 4, 9)


def gradients(model, hidden, weight):
    model.zero_grad()
    (hidden * weight).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_against_plain(model, sequences, atol=2e-5):
    ids, bounds = pack(sequences)
    found = packed_hidden_states(model, ids, bounds)
    plain = torch.cat([plain_hidden(model, s) for s in sequences])
    torch.testing.assert_close(found, plain, atol=atol, rtol=1e-4)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    got, expected = gradients(model, found, weight), gradients(model, plain, weight)
    assert got.keys() == expected.keys() and got
    for name in expected:
        scale = expected[name].abs().max().clamp_min(1.0)
        torch.testing.assert_close(got[name] / scale, expected[name] / scale, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", [*CONFIGS, *UNPACKABLE])
def test_matches_plain_forward(name):
    check_against_plain(tiny_model(name), random_ids(5, 1, 30, 12))
    check_against_plain(tiny_model(name), random_ids(1))


@pytest.mark.parametrize("name", walk(MERGE))
def test_the_student_packs_what_merges(name):
    model = build(name)
    reason = refuses_packing(seam.body_of(model))
    assert (reason is None) == (name != "phi3-longrope"), reason
    sequences = random_ids(*LENGTHS, seed=2)
    got, alone = packed_hidden_states(model, *pack(sequences)), torch.cat([plain_hidden(model, s) for s in sequences])
    assert (got - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "deepseek-v3", "opt"])
def test_gradients_of_other_architectures(name):
    model, sequences = build(name), random_ids(*LENGTHS, seed=2)
    hidden = packed_hidden_states(model, *pack(sequences)), torch.cat([plain_hidden(model, s) for s in sequences])
    # Not the sum of squares: the final norm holds that constant.
    got, expected = (gradients(model, x, torch.linspace(-1.0, 1.0, x.shape[-1]).sin()) for x in hidden)
    assert got.keys() == expected.keys()
    assert name != "gpt-oss" or any(n.endswith("sinks") and g.abs().max() > 0.01 for n, g in got.items())
    for parameter in expected:
        # The bias of keys has no gradient but rounding: it adds the same to all scores.
        assert (got[parameter] - expected[parameter]).norm() <= 1e-4 * expected[parameter].norm() + 1e-5, parameter


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_dropout_with_caps_or_sinks_is_left_to_the_model(name, caplog):
    packed.say_once.cache_clear()
    model = build(name, attention_dropout=0.5)
    ids, bounds = pack(random_ids(*LENGTHS, seed=2))
    still = packed_hidden_states(model, ids, bounds)
    assert not told(caplog)
    model.train()
    assert not torch.allclose(packed_hidden_states(model, ids, bounds), still)
    assert "attention_dropout=0.5" in caplog.text


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral-window-below-context"])
def test_lora_in_training_with_checkpointing(name, reentrant):
    # Recomputation happens in backward, after the forward's own settings are gone.
    model = with_lora(tiny_model(name))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    check_against_plain(model, random_ids(5, 1, 30, 12))


def test_autocast_over_fp32_weights():
    model = tiny_model()
    sequences = random_ids(5, 1, 12)
    ids, bounds = pack(sequences)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed_hidden_states(model, ids, bounds)
        plain = torch.cat([plain_hidden(model, s) for s in sequences])
    exact = packed_hidden_states(model, ids, bounds)
    assert (found - exact).norm() <= 1.25 * (plain - exact).norm()
    found.square().sum().backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())


def test_empty_sequence_in_a_padded_batch_gives_finite_gradients():
    model = tiny_model("falcon")
    ids, bounds = pack(random_ids(5, 0, 3))
    packed_hidden_states(model, ids, bounds).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("lengths", [(3, 25, 1, 30), (25, 0, 3), (25, 30), (0, 3)])
def test_a_long_sequence_does_not_move_the_positions_of_short_ones(lengths):
    """longrope: beyond 24 tokens all positions of a call are others."""
    model = build("phi3-longrope")
    assert rope_switch(model.base_model) == 24
    sequences = random_ids(*lengths)
    ids, bounds = pack(sequences)
    got = packed_hidden_states(model, ids, bounds)
    want = torch.cat([plain_hidden(model, s) for s in sequences if len(s)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_settings_come_back_also_after_an_error():
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.train()
    before = model.config._attn_implementation
    checkpoint = model.model.layers[0]._gradient_checkpointing_func
    ids, bounds = pack(random_ids(5, 3))
    packed_hidden_states(model, ids, bounds)
    with pytest.raises(IndexError):
        packed_hidden_states(model, ids + 10_000, bounds)
    assert model.config._attn_implementation == before
    assert model.model.layers[0]._gradient_checkpointing_func is checkpoint
    torch.testing.assert_close(model(ids.unsqueeze(0)).logits.shape, torch.Size([1, 8, 97]))


def test_dropout_acts_in_training():
    model = tiny_model(attention_dropout=0.5)
    ids, bounds = pack(random_ids(9, 4))
    still = packed_hidden_states(model, ids, bounds)
    model.train()
    assert not torch.allclose(packed_hidden_states(model, ids, bounds), still)
    model.eval()
    assert torch.equal(packed_hidden_states(model, ids, bounds), still)


def test_unpackable_architecture_says_so_once(caplog):
    packed.say_once.cache_clear()
    model = tiny_model("falcon")
    ids, bounds = pack(random_ids(5, 3))
    for _ in range(2):
        packed_hidden_states(model, ids, bounds)
    assert len(told(caplog)) == 1 and "falcon" in caplog.text


def test_too_long_and_malformed():
    model = tiny_model()
    (ids,) = random_ids(130)
    with pytest.raises(ValueError, match="130 tokens, 2 more than"):
        packed_hidden_states(model, ids, torch.tensor([0, 130]))
    packed_hidden_states(model, ids, torch.tensor([0, 70, 130]))
    with pytest.raises(ValueError, match="input_ids"):
        packed_hidden_states(model, ids.view(2, 65), torch.tensor([0, 65, 130]))
    with pytest.raises(TypeError, match="causal LM"):
        packed_hidden_states(torch.nn.Linear(2, 2), ids, torch.tensor([0, 130]))


def test_layer_that_skips_packed_attention_is_an_error(monkeypatch):
    monkeypatch.setattr(seam, "using_attention", lambda *_: nullcontext)
    ids, bounds = pack(random_ids(5, 3))
    with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2\]"):
        packed_hidden_states(tiny_model(), ids, bounds)


def test_no_tensor_has_a_vocabulary_dimension():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        seen: set[int] = set()  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "embedding" not in str(func):
                self.seen.update(out.shape)
            return out

    model = tiny_model()
    ids, bounds = pack(random_ids(5, 3))
    with Shapes() as shapes:
        packed_hidden_states(model, ids, bounds)
    assert 97 not in shapes.seen and 48 in shapes.seen

"""The check of the decoding loop: what rounds is accepted in every type, and what is wrong is found in every type."""

from __future__ import annotations

import pytest
import torch
from tiny import lora_model, tiny_model

from opcd_fast.models import seam, with_prefix
from opcd_fast.rollout.check import check_decoding, in_float32, scored
from opcd_fast.rollout.decoding import BatchRun, decode

PROMPTS = [[*range(20, 33)], [*range(20, 31), 7], [5, 6, 7], [*range(40, 90)]]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def check(model, vocab_size=None, tokens=8):
    def loop():
        uniform = torch.zeros(len(PROMPTS), tokens, dtype=torch.float64)
        options = {"stop_token_ids": [256], "temperature": 0.0, "top_p": 1.0, "vocab_size": vocab_size}
        return decode(model, PROMPTS, uniform, **options)

    with torch.no_grad(), seam.scoring_mode(model):
        return check_decoding(model, loop, PROMPTS, vocab_size)


def make(kind, dtype=torch.float32):
    if kind == "plain":
        return tiny_model(dtype=dtype)
    if kind == "prefix":
        return with_prefix(tiny_model(dtype=dtype), 5, [[*range(100, 120)]])
    if kind == "adapter in float32":
        model = lora_model(dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.data = parameter.data.to(dtype)
        return model
    return lora_model(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "adapter", "adapter in float32", "prefix"])
def test_the_loop_is_accepted(kind, dtype):
    for vocab_size in (None, 50):  # the head's padding counts for neither side
        good, figures = check(make(kind, dtype), vocab_size)
        assert good, figures


@pytest.mark.parametrize("tokens", [1, 8])
def test_rounding_of_large_logits_is_accepted(tokens):
    """Spacing of bfloat16 between 128 and 256 is 1: two right ways differ by whole nats."""
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(64)
    good, figures = check(model, tokens=tokens)
    assert good, figures


def sees_padding(monkeypatch):
    good = BatchRun.next

    def wrong(self, tokens):
        self.bias = torch.zeros_like(self.bias)
        return good(self, tokens)

    monkeypatch.setattr(BatchRun, "next", wrong)


def misses_the_first_key(monkeypatch):
    good = BatchRun._visible

    def wrong(self, *layer):
        first, *more, visible = good(self, *layer)
        bias = None if visible.bias is None else visible.bias[:, 1:]
        return first + 1, *more, visible._replace(bias=bias)

    monkeypatch.setattr(BatchRun, "_visible", wrong)


def counts_positions_from_one(monkeypatch):
    good = BatchRun._forward

    def wrong(self, ids, positions, keep):
        return good(self, ids, positions if self._reading else positions + 1, keep)

    monkeypatch.setattr(BatchRun, "_forward", wrong)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("fault", [sees_padding, misses_the_first_key, counts_positions_from_one])
def test_a_fault_is_found(fault, dtype, monkeypatch):
    model = make("adapter", dtype)
    fault(monkeypatch)
    good, figures = check(model)
    assert not good, figures


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_missing_adapter_is_found_where_rounding_would_hide_it(dtype, monkeypatch):
    model = make("adapter", dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.02)
    good = BatchRun._forward

    def wrong(self, *arguments):
        with seam.without_adapters(model):
            return good(self, *arguments)

    assert check(model)[0]
    monkeypatch.setattr(BatchRun, "_forward", wrong)
    found, figures = check(model)
    assert not found and "in float32" in figures, figures


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_fault_of_the_models_own_type_alone_is_found(dtype, monkeypatch):
    good = BatchRun.attend

    def wrong(self, module, query, key, value, *arguments, **options):
        value = value.flip(2) if query.dtype == dtype else value
        return good(self, module, query, key, value, *arguments, **options)

    monkeypatch.setattr(BatchRun, "attend", wrong)
    found, figures = check(make("plain", dtype))
    assert not found and "a plain forward" in figures, figures


def test_what_is_not_a_number_is_not_accepted(monkeypatch):
    monkeypatch.setattr(BatchRun, "next", lambda self, tokens: torch.full((len(tokens), 261), float("nan")))
    assert not check(make("plain"))[0]


@pytest.mark.parametrize("kind", ["plain", "adapter", "adapter in float32"])
def test_float32_is_that_of_a_model_in_float32(kind):
    narrow = make(kind, torch.bfloat16)
    wide = make(kind, torch.bfloat16).float()
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad(), in_float32(narrow):
        found = narrow(input_ids=ids).logits
    assert found.dtype == torch.float32 and torch.equal(found, wide(input_ids=ids).logits)


@pytest.mark.parametrize("raises", [False, True])
def test_the_weights_are_the_same_objects_afterwards(raises, monkeypatch):
    model = make("adapter in float32", torch.bfloat16)
    before = {name: (p, p.data_ptr(), p._version) for name, p in model.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    if raises:
        monkeypatch.setattr(type(model.get_base_model().model.layers[1].mlp), "forward", lambda *a: 1 / 0)
    try:
        with torch.no_grad(), in_float32(model):
            model(input_ids=torch.tensor(PROMPTS[:1]))
    except ZeroDivisionError:
        assert raises
    after = {name: (p, p.data_ptr(), p._version) for name, p in model.named_parameters()}
    assert all(after[name][0] is p and after[name] == before[name] for name, (p, *_) in before.items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_scores_are_of_each_sequence_alone():
    model = make("plain")
    answers = [([3, 4, 5], [0.0] * 3), ([6], [0.0])]
    found, largest = scored(model, PROMPTS[:2], answers)
    with torch.no_grad():
        logits = [model(torch.tensor([[*p, *ids]])).logits[0, len(p) - 1 : -1] for p, (ids, _) in zip(PROMPTS, answers)]
    wanted = [z.double().log_softmax(-1)[range(len(ids)), ids] for z, (ids, _) in zip(logits, answers)]
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-6, rtol=1e-6)
    assert largest == pytest.approx(float(torch.cat(logits).abs().max()))

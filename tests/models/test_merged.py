"""The copy that generation uses: the adapter folded in, in the type that this machine multiplies fast."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny import lora_model, tiny_model

from opcd_fast.models import BlockedLinear, MergedCopy, merged
from opcd_fast.rollout import TransformersRollout

IDS = torch.arange(3, 40)[None]


@pytest.fixture(params=[True, False], ids=["bf16 unit", "emulated"])
def has_bf16(request, monkeypatch):
    monkeypatch.setattr(merged, "cpu_has_bf16", lambda: request.param)
    return request.param


def test_a_copy_of_a_bf16_model_is_as_exact_as_its_type(has_bf16):
    model = lora_model(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    copied = MergedCopy(model)
    plain = copied.refresh()
    assert plain.dtype == (torch.bfloat16 if has_bf16 else torch.float32)
    exact = lora_model(torch.bfloat16).double()
    wanted = exact(input_ids=IDS).logits
    error = (plain(input_ids=IDS).logits.double() - wanted).norm() / wanted.norm()
    assert error < (2e-2 if has_bf16 else 1e-6)
    for name, parameter in model.named_parameters():  # the trained model stays as it is, type included
        assert parameter.dtype == torch.bfloat16 and parameter.equal(before[name]), name


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e-2, 1.0])
def test_a_copy_in_bf16_is_about_as_near_to_the_exact_model_as_the_model_itself(monkeypatch, size):
    """It rounds each weight once more, which at most doubles the roundings of a product; small adapters vanish in
    that, and matter less than what bf16 does to hidden states anyway."""
    monkeypatch.setattr(merged, "cpu_has_bf16", lambda: True)
    model = lora_model(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(size)
    exact = copy.deepcopy(model).double()(input_ids=IDS).logits.log_softmax(-1)
    apart = [
        (one(input_ids=IDS).logits.double().log_softmax(-1) - exact).norm()
        for one in (MergedCopy(model).refresh(), model)
    ]
    assert apart[0] < 2 * apart[1]


def test_the_copy_follows_the_adapter(has_bf16):
    model = lora_model(torch.bfloat16)
    copied = MergedCopy(model)
    first = copied.refresh()(input_ids=IDS).logits.clone()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(0.5)
    assert not copied.refresh()(input_ids=IDS).logits.equal(first)
    for off in (False, True):
        with model.disable_adapter() if off else nullcontext():
            wanted = model(input_ids=IDS).logits.double()
            assert (copied.refresh()(input_ids=IDS).logits.double() - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("replaced", [False, True])
def test_the_copy_follows_the_base(has_bf16, replaced):
    model = lora_model(torch.bfloat16)
    copied = MergedCopy(model)
    copied.refresh()
    for name in ("model.norm", "model.layers.0.self_attn.q_proj.base_layer"):
        layer = model.base_model.model.get_submodule(name)
        if replaced:
            layer.weight = torch.nn.Parameter(layer.weight.detach() * 2, requires_grad=False)
        else:
            layer.weight.data.mul_(2)
    wanted = model(input_ids=IDS).logits.double()
    assert (copied.refresh()(input_ids=IDS).logits.double() - wanted).norm() < 2e-2 * wanted.norm()
    kept = copied.model
    assert copied.refresh() is kept


def test_bytes_are_those_that_the_copy_holds(has_bf16):
    model = lora_model(torch.bfloat16)
    copied = MergedCopy(model).refresh()
    plain = {p.data_ptr(): p.nbytes for p in copied.parameters()}
    shared = {p.data_ptr() for p in model.parameters()}
    blocks = sum(layer.weight.nbytes for layer in copied.modules() if isinstance(layer, BlockedLinear))
    own = sum(size for pointer, size in plain.items() if pointer not in shared) + blocks
    assert MergedCopy.bytes_needed(model) == own


def test_answers_come_from_the_copy_in_that_type(has_bf16):
    sampler = TransformersRollout(lora_model(torch.bfloat16), stop_token_ids=[256])
    answers = sampler.generate([[*range(20, 40)], [*range(30, 36)]], max_new_tokens=5, seed=3)
    assert [len(answer.token_ids) for answer in answers] == [5, 5] and sampler.copies
    assert sampler._copy.model.dtype == (torch.bfloat16 if has_bf16 else torch.float32)


def test_lora_with_bias_is_not_merged():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_bias=True)
    assert not MergedCopy.supports(get_peft_model(tiny_model(attention_bias=True), config))


def test_a_base_that_changed_before_the_first_answer_is_copied_again():
    model = lora_model(torch.float32)
    copied = MergedCopy(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    got, wanted = (one(input_ids=IDS).logits for one in (copied.refresh(), model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

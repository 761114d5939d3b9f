"""The copy that generation uses: the adapter folded in, in the type that this machine multiplies fast."""

from __future__ import annotations

import pytest
import torch
from tiny import lora_model

from opcd_fast import merged
from opcd_fast.merged import MergedCopy
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


def test_the_copy_follows_the_adapter(has_bf16):
    model = lora_model(torch.bfloat16)
    copied = MergedCopy(model)
    first = copied.refresh()(input_ids=IDS).logits.clone()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(0.5)
    assert not copied.refresh()(input_ids=IDS).logits.equal(first)
    wanted = model(input_ids=IDS).logits.double()
    assert (copied.model(input_ids=IDS).logits.double() - wanted).norm() < 2e-2 * wanted.norm()


def test_bytes_are_those_that_the_copy_holds(has_bf16):
    model = lora_model(torch.bfloat16)
    held = {p.data_ptr(): p.numel() * p.element_size() for p in MergedCopy(model).model.parameters()}
    shared = {p.data_ptr() for p in model.parameters()}
    own = sum(size for pointer, size in held.items() if pointer not in shared)
    assert MergedCopy.bytes_needed(model) == own


def test_answers_come_from_the_copy_in_that_type(has_bf16):
    sampler = TransformersRollout(lora_model(torch.bfloat16), stop_token_ids=[256])
    answers = sampler.generate([[*range(20, 40)], [*range(30, 36)]], max_new_tokens=5, seed=3)
    assert [len(answer.token_ids) for answer in answers] == [5, 5] and sampler._merged is not None
    assert sampler._merged.model.dtype == (torch.bfloat16 if has_bf16 else torch.float32)

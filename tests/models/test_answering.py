"""The copy that answers for weights which are trained in float32."""

from __future__ import annotations

import architectures
import pytest
import torch
from tiny import in_bf16, lora_model, prefixed, tiny_model

from opcd_fast.models import CastCopy, MergedCopy, copy_for_answers

IDS = torch.arange(3, 40)[None]
BF16 = torch.bfloat16


def one_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model(input_ids=IDS % 90, labels=IDS % 90).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "qwen3-moe", "gpt2", "nemotron-h"])
def test_the_copy_is_the_model_cast_by_hand_and_follows_each_step(name):
    model = architectures.build(name).float()
    copied = CastCopy(model, BF16)
    lie = [p.data_ptr() for p in copied.model.parameters()]
    for _ in range(2):
        masters = {name: p.detach().clone() for name, p in model.named_parameters()}
        found, wanted = copied.refresh(), in_bf16(model)
        assert found.dtype == BF16 and not found.training
        assert torch.equal(found(input_ids=IDS % 90).logits, wanted(input_ids=IDS % 90).logits)
        for (name, a), (_, b) in zip(found.named_buffers(), wanted.named_buffers(), strict=True):
            assert torch.equal(a.to(b.dtype), b) and (a.dtype == torch.float32 or "inv_freq" not in name)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32 and torch.equal(parameter, masters[name])
        one_step(model)
    assert [p.data_ptr() for p in copied.model.parameters()] == lie, "recorded steps read them there"


@pytest.mark.parametrize("name", ["minimax", "falcon-h1", "gemma4"])
def test_buffers_are_as_they_were_when_the_model_was_loaded(name):
    """A model in bfloat16 that was widened to be trained."""
    model = architectures.build(name).to(BF16)
    wanted = model(input_ids=IDS % 90).logits
    assert torch.equal(CastCopy(model.float(), BF16).refresh()(input_ids=IDS % 90).logits, wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tied):
    model = tiny_model(tie_word_embeddings=tied)
    found = CastCopy(model, BF16).refresh()
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert sum(p.nbytes for p in found.parameters()) == 2 * sum(p.numel() for p in model.parameters())


def test_what_there_is_to_copy():
    def made(model, dtype=BF16):
        make, *_ = copy_for_answers(model, dtype, "cpu", 2**40)
        return type(make and make())

    assert made(lora_model()) is MergedCopy and made(tiny_model()) is CastCopy
    nothing = [made(tiny_model(), dtype) for dtype in (None, torch.float32)]
    assert {*nothing, made(tiny_model(dtype=BF16)), made(prefixed())} == {type(None)}


@pytest.mark.parametrize(
    ("device", "has_bf16", "free", "worth"),
    [("cuda", "0", 16.1, True), ("cuda", "0", 15.9, False), ("cpu", "1", 16.1, True), ("cpu", "0", 16.1, False)],
)
def test_a_cast_copy_is_made_where_the_type_is_fast_and_training_has_room(device, has_bf16, free, worth, monkeypatch):
    """free: bytes for each weight; gradients and Adam's state will be 12 of them, and the copy 2."""
    monkeypatch.setenv("OPCD_CPU_BF16", has_bf16)
    model = tiny_model()
    weights = sum(p.numel() for p in model.parameters())
    assert copy_for_answers(model, BF16, device, free * weights)[1] == worth

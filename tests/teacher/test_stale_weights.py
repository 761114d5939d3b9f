"""Every way in which weights change behind a teacher's back: it reads its context again, or it would serve what it read
before. Each is shown on a teacher that was promised frozen weights, which does serve that."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tiny_models import assert_close, pack, random_ids, reference, tiny_model, with_lora

from opcd_fast.teacher import ContextTeacher

(CONTEXT,), SEQUENCES = random_ids(20), random_ids(5, 3)
IDS, BOUNDS = pack(SEQUENCES)


def fused_step(model):
    """Without a word to torch's counters of changes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    model(IDS.unsqueeze(0)).logits.square().mean().backward()
    optimizer.step()


def in_place(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)


def through_numpy(model):
    model.model.layers[0].self_attn.k_proj.weight.detach().numpy()[:] *= 1.5


def loaded_by_assignment(model):
    model.load_state_dict({name: x.clone() for name, x in tiny_model(seed=5).state_dict().items()}, assign=True)


def frequencies_replaced(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def layers_reordered(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index


def layers_pruned(model):
    del model.model.layers[1]
    model.config.num_hidden_layers = len(model.model.layers)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index


CHANGES = [
    fused_step, in_place, through_numpy, loaded_by_assignment, frequencies_replaced, layers_reordered, layers_pruned,
]  # fmt: skip


def check(model, change, atol=1e-4, **options):
    """After `change` a teacher gives what a plain forward gives, and one with frozen weights does not until told."""
    teacher = ContextTeacher(model, CONTEXT, **options)
    frozen = ContextTeacher(model, CONTEXT, frozen_weights=True, **options)
    before = teacher.hidden_states_packed(IDS, BOUNDS)
    assert torch.equal(frozen.hidden_states_packed(IDS, BOUNDS), before)
    kept = teacher.prefixes[0]
    assert teacher.prefixes[0] is kept, "what did not change is not read again"
    change(model)
    fresh = reference(model, [CONTEXT], SEQUENCES, [0, 0])
    assert_close(teacher.hidden_states_packed(IDS, BOUNDS), fresh, atol)
    try:
        stale = frozen.hidden_states_packed(IDS, BOUNDS)
    except (RuntimeError, IndexError):  # keys of layers that are gone
        assert change is layers_pruned
    else:
        assert (stale - fresh).abs().max() > 1e-3, "the change is too small to tell"
    frozen.invalidate()
    assert_close(frozen.hidden_states_packed(IDS, BOUNDS), fresh, atol)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_model(change):
    check(tiny_model(), change)


def test_a_change_in_inference_mode():
    with torch.inference_mode():
        model = copy.deepcopy(tiny_model())
        assert next(model.parameters()).is_inference()
        check(model, in_place)


# --- adapters -----------------------------------------------------------------------------------------------


def test_a_step_of_an_adapter():
    check(with_lora(tiny_model()), fused_step, adapter="active")


def test_an_adapter_that_is_swapped(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    other = with_lora(tiny_model())
    for name, p in other.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0.0, 0.3)
    other.save_pretrained(tmp_path)
    swap = partial(hotswap_adapter, model_name_or_path=str(tmp_path), adapter_name="default")
    check(with_lora(tiny_model()), swap, adapter="active")


def test_an_adapter_that_is_merged_for_good():
    """Without its adapters the model is another one from then on."""
    model = with_lora(tiny_model())
    teacher = ContextTeacher(model, CONTEXT)
    frozen = ContextTeacher(model, CONTEXT, frozen_weights=True)
    for one in (teacher, frozen):
        assert_close(one.hidden_states_packed(IDS, BOUNDS), reference(tiny_model(), [CONTEXT], SEQUENCES, [0, 0]))
    whole = model.merge_and_unload()
    fresh = reference(whole, [CONTEXT], SEQUENCES, [0, 0])
    assert_close(teacher.hidden_states_packed(IDS, BOUNDS), fresh)
    assert (frozen.hidden_states_packed(IDS, BOUNDS) - fresh).abs().max() > 1e-3


def test_a_trained_adapter_leaves_a_teacher_without_it_alone():
    model = with_lora(tiny_model())
    teacher = ContextTeacher(model, CONTEXT)
    kept = teacher.prefixes[0]
    fused_step(model)
    assert teacher.prefixes[0] is kept

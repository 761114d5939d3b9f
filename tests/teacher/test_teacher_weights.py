"""A teacher whose model is the student's too, and weights that change under it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    assert_close,
    pack,
    random_ids,
    reference,
    tiny_model,
    with_lora,
)

from opcd_fast.models import packed_hidden_states, seam
from opcd_fast.teacher import ContextTeacher

# --- a model shared with the student ------------------------------------------------------------------------


def in_training(dropout=0.3):
    model = with_lora(tiny_model(attention_dropout=dropout), lora_dropout=dropout)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def flags(model):
    return [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_shared_model_in_training_with_checkpointing(path):
    model = in_training()
    model.base_model.model.model.layers[1].mlp.eval()  # a module of its own mind
    before, requires, state = flags(model), [p.requires_grad for p in model.parameters()], seam.adapter_state(model)
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    off = ContextTeacher(model, context, path=path).hidden_states_packed(ids, bounds)
    on = ContextTeacher(model, context, path=path, adapter="active").hidden_states_packed(ids, bounds)
    assert flags(model) == before and [p.requires_grad for p in model.parameters()] == requires
    assert seam.adapter_state(model) == state
    assert_close(off, reference(tiny_model(), [context], sequences, [0, 0]))
    assert_close(on, reference(model.eval(), [context], sequences, [0, 0]))
    assert (on - off).abs().max() > 0.05


def test_flags_come_back_after_an_error():
    model = in_training()
    before, implementation = flags(model), model.config._attn_implementation
    teacher = ContextTeacher(model, random_ids(20)[0])

    def broken(*_):
        raise ArithmeticError

    next(layer for name, layer in model.named_modules() if name.endswith("mlp")).register_forward_hook(broken)
    with pytest.raises(ArithmeticError):
        teacher.hidden_states(torch.tensor([[1]]))
    assert flags(model) == before and model.config._attn_implementation == implementation
    assert seam.adapter_state(model) == seam.adapter_state(in_training())


def test_trained_copies_of_modules_are_off_too():
    model = with_lora(tiny_model(), target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    got = ContextTeacher(model, context).hidden_states_packed(ids, bounds)
    assert_close(got, reference(tiny_model(), [context], sequences, [0, 0]))


def test_merged_adapter_is_an_error():
    model = with_lora(tiny_model())
    teacher = ContextTeacher(model, random_ids(20)[0])
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        teacher.hidden_states(torch.tensor([[3, 4]]))
    model.unmerge_adapter()
    teacher.hidden_states(torch.tensor([[3, 4]]))


def test_student_gradients_survive_a_teacher_between_forward_and_backward():
    model = in_training(dropout=0.0)
    ids, bounds = pack(random_ids(5, 3))
    teacher = ContextTeacher(model, random_ids(20)[0])
    grads = []
    for between in (False, True):
        model.zero_grad()
        hidden = packed_hidden_states(model, ids, bounds)
        if between:
            teacher.hidden_states_packed(ids, bounds)
        hidden.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0 and all(map(torch.equal, *grads))


# --- weights that change ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["pad", "concat"])
def test_an_attention_that_drops_sinks_is_refused_also_when_it_is_set_later(path):
    from architectures import build

    model, (context, sequence) = build("gpt-oss"), random_ids(20, 5)
    teacher = ContextTeacher(model, context, path=path)
    teacher.hidden_states_packed(*pack([sequence]))
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match="sdpa attention drops this model's attention sinks"):
        teacher.hidden_states_packed(*pack([sequence]))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_cast_model_is_checked_and_read_anew(frozen):
    model, (context, sequence) = tiny_model(), random_ids(20, 5)
    teacher = ContextTeacher(model, context, frozen_weights=frozen)
    teacher.hidden_states_packed(*pack([sequence]))
    model.bfloat16()
    assert "in torch.bfloat16" in teacher.explain()
    assert teacher.prefixes[0].keys[0].dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", [False, True])
def test_an_adapter_made_stronger_is_noticed(frozen):
    model = with_lora(tiny_model())
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, context, adapter="active", frozen_weights=frozen)
    before = teacher.hidden_states_packed(ids, bounds)
    for module in seam.adapter_modules(model):
        module.set_scale("default", 3.0)
    got = teacher.hidden_states_packed(ids, bounds)
    assert (got - before).abs().max() > 1e-2
    assert_close(got, reference(model, [context], sequences, [0, 0]))

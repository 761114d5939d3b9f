"""A teacher whose model is the student's too, and weights that change under it."""

from __future__ import annotations

from contextlib import nullcontext

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

from opcd_fast.models import seam
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
    before, requires = flags(model), [p.requires_grad for p in model.parameters()]
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    got = ContextTeacher(model, context, path=path).hidden_states_packed(ids, bounds)
    assert flags(model) == before and [p.requires_grad for p in model.parameters()] == requires
    assert_close(got, reference(tiny_model(), [context], sequences, [0, 0]))


@pytest.mark.parametrize("path", ["merge", "pad"])
def test_without_the_guard_the_count_raises(path, monkeypatch):
    # transformers before 5.24 hands a checkpointed layer no cache: the context would be gone, silently. From there on a
    # layer keeps it where nothing wants a gradient.
    model = in_training(dropout=0.0)
    # One token on pad: with more, the mask would not fit keys that lack the context, an error as well.
    (context,), (sequence,) = random_ids(20), random_ids(5 if path == "merge" else 1)
    teacher = ContextTeacher(model, context, path=path)
    honest = teacher.hidden_states(sequence.unsqueeze(0))
    monkeypatch.setattr(seam, "scoring_mode", lambda model: nullcontext())
    keeps = seam.takes_cache(model) == "cache"
    with nullcontext() if keeps else pytest.raises(RuntimeError, match="did not (get its|read the) context"):
        assert_close(teacher.hidden_states(sequence.unsqueeze(0)), honest)


def test_flags_come_back_after_an_error():
    model = in_training()
    before, implementation = flags(model), model.config._attn_implementation
    teacher = ContextTeacher(model, random_ids(20)[0])
    with pytest.raises(IndexError):
        teacher.hidden_states(torch.tensor([[10_000]]))
    assert flags(model) == before and model.config._attn_implementation == implementation
    assert seam.adapter_state(model) == seam.adapter_state(in_training())


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_adapter_disabled_is_the_base_and_active_is_not(path):
    model = with_lora(tiny_model())
    base = tiny_model()
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    state = seam.adapter_state(model)
    off = ContextTeacher(model, context, path=path).hidden_states_packed(ids, bounds)
    assert seam.adapter_state(model) == state
    on = ContextTeacher(model, context, path=path, adapter="active").hidden_states_packed(ids, bounds)
    assert_close(off, reference(base, [context], sequences, [0, 0]))
    assert_close(on, reference(model, [context], sequences, [0, 0]))
    assert (on - off).abs().max() > 0.05


def test_adapter_disabled_by_the_user_stays_disabled():
    model = with_lora(tiny_model())
    teacher = ContextTeacher(model, random_ids(20)[0])
    with model.disable_adapter():
        state = seam.adapter_state(model)
        teacher.hidden_states(torch.tensor([[3, 4]]))
        assert seam.adapter_state(model) == state


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


def test_virtual_tokens_are_refused():
    from peft import PromptTuningConfig, get_peft_model

    from opcd_fast.models import packed_hidden_states

    model = get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="virtual tokens"):
        ContextTeacher(model, [1], adapter="active")
    with pytest.raises(ValueError, match="virtual tokens"):
        packed_hidden_states(model, *pack(random_ids(5, 3)))
    ContextTeacher(model, [1]).hidden_states(torch.tensor([[3, 4]]))  # the base model has none


def test_merged_adapter_is_an_error():
    model = with_lora(tiny_model())
    teacher = ContextTeacher(model, random_ids(20)[0])
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        teacher.hidden_states(torch.tensor([[3, 4]]))
    model.unmerge_adapter()
    teacher.hidden_states(torch.tensor([[3, 4]]))


def test_student_gradients_survive_a_teacher_between_forward_and_backward():
    from opcd_fast.models import packed_hidden_states

    model = in_training()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    for layer in model.base_model.model.model.layers:
        layer.self_attn.attention_dropout = 0.0
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
    assert len(grads[0]) == len(grads[1]) > 0
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


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


def test_an_adapter_added_later_is_watched():
    from peft import LoraConfig

    model = with_lora(tiny_model())
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, context, adapter="active")
    model.add_adapter("later", LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("later")
    for _ in range(2):  # the second time only its weights are other than when the context was read
        teacher.hidden_states_packed(ids, bounds)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B.later" in name:
                    parameter.normal_(0.0, 0.3)
    got = teacher.hidden_states_packed(ids, bounds)
    assert_close(got, reference(model, [context], sequences, [0, 0]))

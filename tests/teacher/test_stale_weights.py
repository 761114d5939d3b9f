"""Every way in which weights change behind a teacher's back: it reads its context again, or it would serve what it read
before. Each is shown on a teacher that was promised frozen weights, which does serve that."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from tiny_models import assert_close, pack, random_ids, reference, tiny_model, with_lora
from torch import nn

from opcd_fast.teacher import ContextTeacher

(CONTEXT,), SEQUENCES = random_ids(20), random_ids(5, 3)
IDS, BOUNDS = pack(SEQUENCES)


def backward(model):
    model(IDS.unsqueeze(0)).logits.square().mean().backward()


def optimizer_step(model, **options):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **options)
    backward(model)
    optimizer.step()


def plain_step(model):
    optimizer_step(model)


def fused_step(model):
    optimizer_step(model, fused=True)


def compiled_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.05))
    backward(model)
    torch.compile(optimizer.step, backend="aot_eager")()


def compiled_fused_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    backward(model)
    torch.compile(optimizer.step, backend="eager")()


def fused_sgd_kernel(model):
    backward(model)
    parameters = list(model.parameters())
    with torch.no_grad():
        torch._fused_sgd_(
            [p.detach() for p in parameters], [p.grad for p in parameters], [], weight_decay=0.0, momentum=0.0, lr=5.0,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=True,
        )  # fmt: skip


def masters_copied_through_data(model):
    for p in model.parameters():
        p.data.copy_(p.detach().float() * 1.5)


def in_place(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)


def through_numpy(model):
    model.model.layers[0].self_attn.k_proj.weight.detach().numpy()[:] *= 1.5


def loaded_by_assignment(model):
    model.load_state_dict({name: x.clone() for name, x in tiny_model(seed=5).state_dict().items()}, assign=True)


def frequencies_in_place(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


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


def negated(model):
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.data = -weight.data


def rows_exchanged(model):
    weight = model.model.layers[1].self_attn.v_proj.weight.data
    weight[[2, 7]] = weight[[7, 2]]


def constant_replaced(model):
    model.model.layers[1].input_layernorm.weight.data.fill_(3.0)


CHANGES = [
    plain_step, fused_step, compiled_step, compiled_fused_step, fused_sgd_kernel, masters_copied_through_data,
    in_place, through_numpy, loaded_by_assignment, frequencies_in_place, frequencies_replaced, layers_reordered,
    layers_pruned, negated, rows_exchanged, constant_replaced,
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


@pytest.mark.parametrize(
    "change", [in_place, rows_exchanged, negated, frequencies_in_place, masters_copied_through_data]
)
def test_changes_of_a_model_that_was_made_in_inference_mode(change):
    with torch.inference_mode():
        model = copy.deepcopy(tiny_model())
    assert next(model.parameters()).is_inference()

    def changed(model):
        with torch.inference_mode():
            change(model)

    with torch.inference_mode():
        check(model, changed)


# --- adapters -----------------------------------------------------------------------------------------------


def merged_and_unloaded(model):
    model.merge_and_unload()


def another_adapter_in_its_place(model, folder):
    from peft.utils.hotswap import hotswap_adapter

    hotswap_adapter(model, folder, adapter_name="default")


@pytest.mark.parametrize("change", [plain_step, fused_step])
def test_changes_of_an_adapter(change):
    check(with_lora(tiny_model()), change, adapter="active")


def test_an_adapter_that_is_swapped(tmp_path):
    other = with_lora(tiny_model())
    for name, p in other.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0.0, 0.3)
    other.save_pretrained(tmp_path)
    check(with_lora(tiny_model()), lambda m: another_adapter_in_its_place(m, str(tmp_path)), adapter="active")


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


# --- other processes ----------------------------------------------------------------------------------------


SENDER = """
import sys, torch
store, weights = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=2)
for x in torch.load(weights):
    torch.distributed.broadcast(x, src=0)
torch.distributed.destroy_process_group()
"""


def test_weights_broadcast_from_another_process(tmp_path):
    weights, store = tmp_path / "weights.pt", tmp_path / "store"
    torch.save([p.detach() for p in tiny_model(seed=5).parameters()], weights)
    sender = subprocess.Popen([sys.executable, "-c", SENDER, str(store), str(weights)])

    def received(model):
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=1, world_size=2)
        try:
            for p in model.parameters():
                torch.distributed.broadcast(p.detach(), src=0)
        finally:
            torch.distributed.destroy_process_group()

    check(tiny_model(), received)
    assert sender.wait(timeout=60) == 0


# --- what is left alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}], ids=["fused", "foreach", "plain"])
def test_other_peoples_graphs_are_left_alone(options):
    """An optimizer does not change a parameter without a gradient, so a graph that needs it stays good."""
    ContextTeacher(tiny_model(), CONTEXT).hidden_states_packed(IDS, BOUNDS)
    used, trained = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    loss = (used * x).square().sum()
    trained.grad = torch.ones(3)
    torch.optim.AdamW([used, trained], **options).step()
    loss.backward()
    assert used.grad is not None and x.grad is not None and float(trained[0]) != 1


def test_a_model_that_was_moved_as_a_whole_and_came_back_is_the_same():
    model = tiny_model()
    teacher = ContextTeacher(model, CONTEXT)
    kept = teacher.prefixes[0]
    for p in model.parameters():
        p.data = p.data.clone()  # as an offloaded model's: other memory, the same numbers
    assert teacher.prefixes[0] is kept

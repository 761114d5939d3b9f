"""A teacher on a device of its own: what crosses over, and what is refused.

No second device is here, so the one that receives is "meta": tensors arrive there with their size and without their
values. Values are tested on a GPU.
"""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import losses, make

from opcd_fast.commands.train import loading
from opcd_fast.errors import InputError
from opcd_fast.teacher import ContextTeacher, RemoteTeacher
from opcd_fast.training.settings import OPCDConfig

META = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Shapes of the tensors that are copied from the CPU to "meta"."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        before = [x for x in args if isinstance(x, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.is_meta and before and not before[0].is_meta:
            self.shapes.append((tuple(out.shape), out.dtype))
        return out


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_only_selected_hidden_states_cross_and_the_head_once():
    model = tiny_model()
    remote = RemoteTeacher(ContextTeacher(model, torch.arange(30, 130), path="merge"), META)
    select = torch.tensor([3, 4, 5, 30, 31])
    with Crossings() as crossings:
        for _ in range(3):
            hidden = remote.hidden_states_packed(torch.arange(40, 75), torch.tensor([0, 20, 35]), select=select)
            assert hidden.is_meta and remote.head.weight.is_meta
    states = ((5, 32), torch.float32)
    assert crossings.shapes == [states, ((261, 32), torch.float32), states, states]


def test_the_head_is_copied_again_when_it_changes():
    model = tiny_model()
    remote = RemoteTeacher(ContextTeacher(model, torch.arange(30, 40), path="merge"), META)
    first = remote.head
    assert remote.head is first and remote.local.head.weight is model.lm_head.weight
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    second = remote.head
    assert second is not first
    model.lm_head.weight = torch.nn.Parameter(torch.randn(261, 32))
    third = remote.head
    assert third is not second
    remote.invalidate()  # after a change that torch does not count
    assert remote.head is not third


@pytest.mark.parametrize("settings", [{}, {"teacher_mode": "ema", "lora_rank": 0, "teacher_ema_decay": 0.5}])
def test_a_run_through_the_wrapper_is_the_same_run(tokenizer, tmp_path, monkeypatch, settings):
    """With the wrapper put around teachers that need none, so that the loop, evaluation and preflight go through it."""
    settings = {"lora_rank": 0, "learning_rate": 3e-3, **settings}
    if "teacher_mode" not in settings:
        settings.update(teacher_model=tiny_model(seed=7, hidden_size=48, num_hidden_layers=3))
    plain = make(tokenizer, tmp_path / "plain", **settings).train()
    monkeypatch.setattr("opcd_fast.training.step.teachers.same_device", lambda *places: False)
    trainer = make(tokenizer, tmp_path / "wrapped", **settings)
    assert isinstance(trainer.teacher, RemoteTeacher) and isinstance(trainer.teachers.reference, RemoteTeacher)
    wrapped = trainer.train()
    assert losses(wrapped) == losses(plain)
    assert wrapped.evaluations == plain.evaluations


def test_a_teacher_that_shares_the_students_weights_cannot_be_elsewhere(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("opcd_fast.training.engines.model_pair.pick_device", lambda *a, **o: META)
    for settings in ({}, {"teacher_mode": "ema"}, {"teacher_mode": "live", "lora_rank": 0}):
        with pytest.raises(InputError, match="drop teacher_device, or give a teacher_model"):
            make(tokenizer, tmp_path / "run", teacher_device="cpu", **settings)


def test_a_device_that_is_not_there_is_named(tokenizer, tmp_path):
    for device, word in (("cuda:7", "teacher_device="), ("gpu", "teacher_device='gpu'")):
        if device == "cuda:7" and torch.cuda.device_count() > 7:
            continue
        with pytest.raises(InputError, match=word):
            make(tokenizer, tmp_path / "run", teacher_device=device, teacher_model=tiny_model(seed=7))
        with pytest.raises(InputError, match=f"^{word}"):  # before the command has loaded it
            loading(OPCDConfig(teacher_device=device), "none", elsewhere=True)

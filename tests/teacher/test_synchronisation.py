"""How often a call asks the device for a number, counted with tensors that say when they are asked.

Where a GPU is, each such question waits for all the work that is queued there. Tensors of `Device` stand for those on
a GPU: what is computed from one is one, and what the package sends there becomes one.
"""

import sys

import pytest
import torch
from architectures import build
from tiny_models import pack, random_ids

from opcd_fast.models import packed_hidden_states, shared_prompt_hidden_states
from opcd_fast.teacher import ContextTeacher

ASKING = {
    "tolist", "item", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__contains__",
}  # fmt: skip
asked = []


class Device(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for i in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        lengths_unknown = name == "repeat_interleave" and "output_size" not in (kwargs or {}) and not (
            len(args) > 1 and isinstance(args[1], int)
        )  # fmt: skip
        if name in ASKING or by_mask or lengths_unknown:
            asked.append(name)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture(autouse=True)
def _sent_to_the_device(monkeypatch):
    asked.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("opcd_fast.") and "on_device" in vars(module):
            monkeypatch.setattr(module, "on_device", lambda x, device: x.as_subclass(Device))


def on_device(x):
    return x.as_subclass(Device)


def test_the_stand_in_notices():
    x = on_device(torch.tensor([1, 2, 0]))
    _ = x.tolist(), (x + 1).max().item(), x.nonzero(), x[x > 0], bool(x[0]), x.repeat_interleave(x), int(x.sum())
    assert asked == ["tolist", "item", "nonzero", "__getitem__", "__bool__", "repeat_interleave", "__int__"]
    _ = x.repeat_interleave(2), x[torch.tensor([0, 1])], x.repeat_interleave(x, output_size=3)
    assert len(asked) == 7


SEQUENCES, INDEX = (5, 1, 17, 4, 9), [1, 0, 2, 0, 1]


@pytest.mark.parametrize("bound", [None, 40_000])
@pytest.mark.parametrize(("name", "path"), [("qwen3", "merge"), ("mistral-window", "merge"), ("falcon", "pad")])
def test_a_call_of_the_teacher_asks_nothing(name, path, bound):
    model, sequences = build(name), random_ids(*SEQUENCES, seed=2)
    contexts = random_ids(20, 6, 0)
    ids, bounds = pack(sequences)
    select = torch.tensor([3, 0, 35, 5])
    reader = ContextTeacher(model, contexts, path=path, max_batch_bytes=bound)
    want = reader.hidden_states_packed(ids, bounds, context_index=INDEX, select=select)  # contexts are read
    asked.clear()
    got = reader.hidden_states_packed(on_device(ids), bounds, context_index=torch.tensor(INDEX), select=select)
    assert isinstance(got, Device) and not asked
    assert torch.equal(torch.Tensor(got), torch.Tensor(want))


def test_what_lies_on_the_device_is_asked_once_each():
    reader = ContextTeacher(build("qwen3"), random_ids(20, 6, 0), path="merge")
    ids, bounds = pack(random_ids(*SEQUENCES, seed=2))
    _ = reader.prefixes, reader.path
    asked.clear()
    options = {"context_index": on_device(torch.tensor(INDEX)), "select": on_device(torch.tensor([3, 0]))}
    reader.hidden_states_packed(on_device(ids), on_device(bounds), **options)
    assert asked == ["tolist"] * 3


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "falcon"])
def test_the_student_asks_nothing_forward_and_backward(name):
    model = build(name)
    ids, bounds = pack(random_ids(*SEQUENCES, seed=2))
    hidden = packed_hidden_states(model, on_device(ids), bounds, select=torch.tensor([3, 0, 35]))
    hidden.square().mean().backward()
    assert isinstance(hidden, Device) and not asked


@pytest.mark.parametrize("name", ["qwen3", "falcon"])  # shared, and each on its own
def test_shared_prompts_ask_nothing(name):
    model = build(name)
    ids, bounds = pack(random_ids(7, 3, 4, 5))
    hidden = shared_prompt_hidden_states(model, on_device(ids), bounds, torch.tensor([-1, 0, 0, -1]))
    hidden.square().mean().backward()
    assert isinstance(hidden, Device) and not asked

"""cuDNN's attention stays out of every forward pass that we run, and of what is recomputed in backward."""

import pytest
import torch
from architectures import build
from tiny_models import pack, random_ids

from opcd_fast.attention import sdpa_without_cudnn
from opcd_fast.integrations.forward import hidden_states
from opcd_fast.models import packed_hidden_states
from opcd_fast.teacher import ContextTeacher

SWITCHES = ("cudnn", "flash", "mem_efficient", "math")


def switches():
    return {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in SWITCHES}


@pytest.fixture
def seen(monkeypatch):
    """What was allowed at each call of torch's attention."""
    found = []
    honest = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        found.append(switches())
        return honest(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return found


def without(outside):
    """The same without cuDNN; plain attention where nothing is left."""
    left = {**outside, "cudnn": False}
    return left if any(left.values()) else {**left, "math": True}


@pytest.fixture(params=[SWITCHES, ("cudnn",), ("flash", "math")], ids="+".join)
def outside(request):
    """What the caller allows, which must be so again afterwards."""
    before = switches()
    for name in SWITCHES:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(name in request.param)
    yield switches()
    for name, on in before.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(on)


def test_the_set(outside):
    with sdpa_without_cudnn():
        assert switches() == without(outside)
    assert switches() == outside
    with pytest.raises(KeyError), sdpa_without_cudnn():
        raise KeyError
    assert switches() == outside


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["padded", "packed", "integrations"])
def test_the_student_forward_and_backward(way, checkpointing, seen, outside):
    # Falcon is padded, under an explicit mask; a packed row without logsumexps goes through torch's attention here.
    model = build("falcon" if way == "padded" else "qwen3")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    ids, bounds = pack(random_ids(5, 1, 9))
    if way == "integrations":
        hidden = hidden_states(model, ids.view(3, 5), torch.ones(3, 5, dtype=torch.int64))
    else:
        hidden = packed_hidden_states(model, ids, bounds)
    assert seen == [without(outside)] * 2 and switches() == outside  # two layers
    hidden.square().mean().backward()
    assert seen == [without(outside)] * (4 if checkpointing else 2) and switches() == outside


@pytest.mark.parametrize("path", ["pad", "concat"])
def test_the_teacher(path, seen, outside):
    teacher = ContextTeacher(build("qwen3"), random_ids(20)[0], path=path)
    teacher.hidden_states_packed(*pack(random_ids(5, 1, 9)))
    assert len(seen) >= 2 and all(one == without(outside) for one in seen) and switches() == outside

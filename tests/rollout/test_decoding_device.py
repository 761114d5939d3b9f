"""What decoding asks of a device: which attention kernels may run, and how often the host waits."""

from __future__ import annotations

import pytest
import torch
from tiny import lora_model, tiny_model
from torch.backends import cuda
from torch.utils._python_dispatch import TorchDispatchMode

from opcd_fast.rollout import decoding
from opcd_fast.rollout import generate as rollout_generate
from opcd_fast.rollout.decoding import decode, tokens_between_looks

PROMPTS = [[*range(20, 33)], [*range(20, 31), 7], [5, 6, 7], [*range(40, 90)]] * 3
STOPS = list(range(0, 261, 9))


def allowed():
    names = ("flash", "mem_efficient", "math", "cudnn")
    return {name for name in names if getattr(cuda, f"{name}_sdp_enabled")()}


def answer(how, model, tokens=40, stops=STOPS, **options):
    uniform = torch.rand(len(PROMPTS), tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"temperature": 0.9, "top_p": 0.95, **options}
    return how(model, PROMPTS, uniform, stop_token_ids=stops, **options)


@pytest.mark.parametrize("how", [decode, rollout_generate.generate])
def test_cudnn_is_left_out(how, monkeypatch):
    """Its plans are made anew for every length of the keys."""
    seen = []
    inner = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **o: seen.append(allowed()) or inner(*a, **o)
    )
    before = allowed()
    answer(how, tiny_model(), tokens=3)
    assert len(seen) >= 6 and all(one == {"flash", "mem_efficient", "math"} for one in seen)
    assert allowed() == before and "cudnn" in before


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number, a result whose size is in the data, a copy."""

    reading = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select", "bincount")

    def __init__(self):
        super().__init__()
        self.counted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or any(name.startswith(one) for one in self.reading):
            self.counted.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [tiny_model, lora_model])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
@pytest.mark.parametrize(("every", "static"), [(1, False), (16, False), (16, True)])
def test_the_host_waits_at_its_looks_alone(make, top_p, every, static, monkeypatch):
    """40 tokens with looks after 16 and 32: two waits, and two more for the answers: 0.1 a token."""
    model = make()
    monkeypatch.setattr(decoding, "tokens_between_looks", lambda device: every)
    lists = []
    inner = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(1) or inner(self))
    with Waits() as waits:
        answers = answer(decode, model, stops=[256], top_p=top_p, static=static)
    assert max(len(ids) for ids, _ in answers) == 40
    assert waits.counted == ["nonzero"] * (39 if every == 1 else 2) and len(lists) == 2


def test_the_counter_counts(monkeypatch):
    ids = torch.arange(5)
    with Waits() as waits:
        bool(ids[0] == 0), int(ids.max()), ids[ids > 2], (ids > 1).nonzero(), torch.equal(ids, ids)
    assert len(waits.counted) >= 5


@pytest.mark.parametrize("every", [3, 16, 1000])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_do_not_depend_on_when_the_host_looks(every, temperature, monkeypatch):
    model = tiny_model()
    wanted = answer(decode, model, temperature=temperature)
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setattr(decoding, "tokens_between_looks", lambda device: every)
    found = answer(decode, model, temperature=temperature)
    assert len({len(ids) for ids, _ in wanted}) > 3
    for (ids, logprobs), (other, values) in zip(found, wanted, strict=True):
        assert ids == other and logprobs == pytest.approx(values, abs=1e-4)
    counts = [rows for rows, length in shapes if length == 1]
    left = [sum(len(ids) > step // every * every for ids, _ in wanted) for step in range(1, len(counts) + 1)]
    assert counts == left, "rows leave at the looks, and not before"


def test_the_rule_is_the_devices():
    assert tokens_between_looks(torch.device("cpu")) == 1
    assert tokens_between_looks(torch.device("cuda")) == 16

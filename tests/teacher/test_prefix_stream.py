"""Prefixes that lie elsewhere than the model: the order of copies, what is on the device, and the same numbers.

There is one device here, so a transfer is put in that copies inside of it and writes down what it is asked.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from architectures import build
from test_chunked_prefill import assert_same_prefix
from tiny_models import pack, plain_after_context, random_ids, tiny_model

from opcd_fast.models.caches import stream as prefix_stream
from opcd_fast.models.caches.stream import BlockingTransfer, PrefixStream, open_transfer
from opcd_fast.teacher import ContextTeacher
from opcd_fast.teacher.prefix import chunked_prefill
from opcd_fast.teacher.prefix import shared as prefix
from opcd_fast.teacher.prefix.shared import SharedPrefix

GARBAGE = 1e4


class Recorder:
    """Two slots. What is read before `wait` or after `release` is garbage, as it may be on a device."""

    def __init__(self, log):
        self.log = log
        self.slots = [[], []]
        self.sources = [[], []]
        self.alive = self.most = 0

    def start(self, slot, tensors):
        assert all(x.numel() for x in tensors)
        self.log.append(("start", slot))
        self.sources[slot] = list(tensors)
        self.slots[slot] = [torch.full_like(x.float(), GARBAGE).to(x.dtype) for x in tensors]
        self.alive += 1
        self.most = max(self.most, self.alive)
        for x in self.slots[slot][:1]:
            weakref.finalize(x, self.freed)
        return list(self.slots[slot])

    def freed(self):
        self.alive -= 1

    def wait(self, slot):
        self.log.append(("wait", slot))
        for place, source in zip(self.slots[slot], self.sources[slot], strict=True):
            place.copy_(source)

    def release(self, slot):
        self.log.append(("release", slot))
        for place in self.slots[slot]:
            place.copy_(torch.full_like(place.float(), GARBAGE))
        self.slots[slot] = []


@pytest.fixture
def transfers(monkeypatch):
    """Every transfer that was opened; all prefixes count as lying elsewhere."""
    opened = []

    def open_recorder(source, device, slot_bytes):
        opened.append(Recorder([]))
        opened[-1].slot_bytes = slot_bytes
        return opened[-1]

    monkeypatch.setattr(prefix_stream, "open_transfer", open_recorder)
    return opened


def stored(count, prefixes=2, empty=()):
    g = torch.Generator().manual_seed(0)

    def one(layer):
        shape = (1, 0, 0, 0) if layer in empty else (1, 2, 5, 4)
        return torch.randn(shape, generator=g), torch.randn(shape, generator=g)

    return [[one(layer) for _ in range(prefixes)] for layer in range(count)]


@pytest.mark.parametrize("empty", [(), (1, 4)])
def test_the_next_layer_is_on_its_way_before_this_one_is_used(transfers, empty):
    layers = stored(5, empty=empty)
    stream, like = PrefixStream(layers), torch.zeros(1)
    full = [i for i in range(5) if i not in empty]
    for index in full:
        with stream.layer(index, like) as (keys, values):
            log = transfers[0].log
            log.append(("used", index))
            for *got, pair in zip(keys, values, layers[index], strict=True):
                assert all(map(torch.equal, got, pair))
            del keys, values, got
    want = [("start", 0)]
    for place, index in enumerate(full):
        slot = place % 2
        if place + 1 < len(full):
            want.append(("start", 1 - slot))
        want += [("wait", slot), ("used", index), ("release", slot)]
    assert transfers[0].log == want and len(transfers) == 1
    assert transfers[0].slot_bytes >= max(x.numel() * 4 for pair in layers[0] for x in pair) * 4
    assert transfers[0].most == 2 and transfers[0].alive == 0


def test_any_order_is_right(transfers):
    layers = stored(4)
    stream = PrefixStream(layers)
    for index in (2, 0, 0, 3, 1, 2):
        with stream.layer(index, torch.zeros(1)) as (keys, values):
            assert torch.equal(keys[1], layers[index][1][0]) and torch.equal(values[0], layers[index][0][1])
            del keys, values
    assert transfers[0].most <= 2


def test_what_is_there_is_not_copied():
    layers = stored(2)
    stream = PrefixStream(layers)
    with stream.layer(0, torch.zeros(1)) as (keys, values):
        assert keys[0] is layers[0][0][0] and values[1] is layers[0][1][1]
    cpu = torch.device("cpu")
    assert open_transfer(cpu, cpu, 1) is None
    assert isinstance(open_transfer(cpu, torch.device("meta"), 1), BlockingTransfer)


# --- whole models -------------------------------------------------------------------------------------------

MODELS = {
    "llama": tiny_model,
    "windows": lambda: tiny_model("qwen2-mixed-window"),
    "gemma2-on-pad": lambda: tiny_model("gemma2"),
    "gemma3n": lambda: build("gemma3n"),  # layers that read the keys of others
    "gemma4": lambda: build("gemma4"),
    "falcon-h1": lambda: build("falcon-h1"),  # recurrent states, on pad
    "zamba2": lambda: build("zamba2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_as_on_the_device(name, monkeypatch):
    model = MODELS[name]()
    contexts, sequences, index = random_ids(20, 6, 0), random_ids(5, 1, 7, 4, 9, seed=2), [1, 0, 2, 0, 1]
    ids, bounds = pack(sequences)
    resident = ContextTeacher(model, contexts)
    want = resident.hidden_states_packed(ids, bounds, context_index=index)

    opened = []
    monkeypatch.setattr(prefix_stream, "open_transfer", lambda *_: opened.append(Recorder([])) or opened[-1])
    teacher = ContextTeacher(model, contexts, prefix_device="cpu")
    assert teacher.path == resident.path and opened  # the check goes that way, too
    opened.clear()
    got = teacher.hidden_states_packed(ids, bounds, context_index=index)
    assert torch.equal(got, want)
    assert len(opened) == (1 if teacher.path == "merge" else 2)  # pad runs context by context; one is empty
    full = sum(x.numel() > 0 for x in teacher.prefixes[0].keys)
    for transfer in opened:
        events = [what for what, _ in transfer.log]
        assert events.count("start") == events.count("wait") == events.count("release") == full
        assert transfer.most <= 2 and transfer.alive == 0
        for place in range(full - 1):  # the next one is started before this one is waited for
            waits = [at for at, event in enumerate(events) if event == "wait"]
            assert events[: waits[place]].count("start") == place + 2
    exact = torch.cat([plain_after_context(model, contexts[i], s) for i, s in zip(index, sequences, strict=True)])
    torch.testing.assert_close(got, exact, atol=1e-4, rtol=0)
    assert "kept on cpu" in teacher.explain() and "MiB on cpu" in teacher.explain()


def test_a_planted_error_on_the_way_is_caught_by_the_check(monkeypatch):
    class Late(Recorder):
        def wait(self, slot):
            pass

    monkeypatch.setattr(prefix_stream, "open_transfer", lambda *_: Late([]))
    with pytest.raises(ValueError, match="path='merge': it failed its check.*use path='auto'"):
        _ = ContextTeacher(tiny_model(), [1, 2], path="merge", prefix_device="cpu").path
    assert ContextTeacher(tiny_model(), [1, 2], prefix_device="cpu").path == "concat"


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed-window"])
def test_a_context_grows_where_it_is_kept(name, monkeypatch):
    """As if the buffers were on another device: what `update` returns must then be copies, and the same."""
    model, (context,) = tiny_model(name), random_ids(50)
    exact = SharedPrefix.build(model, context, chunk_tokens=0)
    assert_same_prefix(SharedPrefix.build(model, context, chunk_tokens=8, device="cpu"), exact)

    copies = []
    honest = chunked_prefill._after
    monkeypatch.setattr(chunked_prefill, "_lies_at", lambda x, device: False)
    monkeypatch.setattr(chunked_prefill, "_after", lambda past, new: copies.append(1) or honest(past, new))
    grown = SharedPrefix.build(model, context, chunk_tokens=8, device="cpu")
    assert_same_prefix(grown, exact)
    assert len(copies) >= 2 * 3 * 6  # keys and values, layers, chunks after the first
    for x in (*grown.keys, *grown.values):
        assert x.untyped_storage().nbytes() == x.numel() * 4


def test_every_key_is_put_where_it_was_asked(monkeypatch):
    """Where the model is and where keys are kept is one device here; that they are put there shows in who does it."""
    put = []
    honest = prefix._placed
    monkeypatch.setattr(prefix, "_placed", lambda x, device: put.append(device) or honest(x, device))
    model, contexts = tiny_model(), random_ids(20, 6)
    ContextTeacher(model, contexts, path="merge").prefixes  # noqa: B018
    assert not put
    teacher = ContextTeacher(model, contexts, path="merge", prefix_device="cpu")
    assert teacher.path == "merge" and set(put) == {torch.device("cpu")}  # its check goes that way, too
    put.clear()
    assert len(teacher.prefixes) == 2 and put == [torch.device("cpu")] * 2 * 2 * 3


def test_concat_keeps_nothing_to_put():
    with pytest.raises(ValueError, match="prefix_device: path='concat' keeps no keys"):
        ContextTeacher(tiny_model(), [1, 2], path="concat", prefix_device="cpu")
    teacher = ContextTeacher(tiny_model("llama-dynamic-rope"), [1, 2], prefix_device="cpu")
    assert teacher.path == "concat" and "prefix_device: not used" in teacher.explain()


def test_bad_places():
    for place in ("nowhere", 3.5):
        with pytest.raises(ValueError, match="prefix_device: expected 'cpu'"):
            ContextTeacher(tiny_model(), [1, 2], prefix_device=place)

"""What ContextTeacher holds of its contexts, and when it reads them."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny_models import (
    assert_close,
    pack,
    random_ids,
    reference,
    tiny_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from opcd_fast.teacher import ContextTeacher
from opcd_fast.teacher.prefix import SharedPrefix


class LargestTensor(TorchDispatchMode):
    """Elements in the largest storage that an operation returned while the mode was on."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // 4)
        return out


def test_nothing_of_size_batch_times_context():
    model = tiny_model()
    (context,) = random_ids(110)
    ids, bounds = pack(random_ids(*[3] * 12))
    replicated = 12 * 110 * 2 * 8  # B x P x H_kv x d: one layer's keys, copied per sequence
    largest = {}
    for path in ("merge", "concat"):
        teacher = ContextTeacher(model, context, path=path, frozen_weights=True)
        before = [p.nbytes for p in teacher.prefixes]
        with LargestTensor() as meter:
            teacher.hidden_states_packed(ids, bounds)
        largest[path] = meter.largest
        assert [p.nbytes for p in teacher.prefixes] == before
    # What does depend on the batch is the suffix alone.
    assert largest["merge"] <= (110 + 36) * 2 * 8 + 36 * 64 < replicated / 2
    assert largest["concat"] >= replicated  # the meter sees what it should


def test_pad_copies_the_prefix_for_one_layer_at_a_time():
    model = tiny_model()
    (context,) = random_ids(110)
    ids, bounds = pack(random_ids(*[3] * 12))
    replicated = 12 * 110 * 2 * 8 * 4  # bytes of one layer's keys, copied per sequence
    alive, most = set(), 0

    class Alive(TorchDispatchMode):
        """Storages of at least one layer's replicated keys that exist at the same time."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= replicated:
                    storage = x.untyped_storage()
                    if storage.data_ptr() not in alive:
                        alive.add(storage.data_ptr())
                        weakref.finalize(storage, alive.discard, storage.data_ptr())
                    most = max(most, len(alive))
            return out

    teacher = ContextTeacher(model, context, path="pad")
    before = teacher.prefixes[0].nbytes
    with Alive():
        teacher.hidden_states_packed(ids, bounds)
    assert teacher.prefixes[0].nbytes == before
    assert 0 < most <= 4, most  # keys and values, once more with their heads repeated; never a second layer


def test_prefix_bytes_do_not_depend_on_the_batch():
    teacher = ContextTeacher(tiny_model(), random_ids(50)[0])
    sizes = set()
    for batch in (1, 4, 16):
        ids, bounds = pack(random_ids(*[4] * batch))
        teacher.hidden_states_packed(ids, bounds)
        sizes.add(teacher.prefixes[0].nbytes)
    assert sizes == {2 * 3 * 50 * 2 * 8 * 4}


@pytest.fixture
def built(monkeypatch):
    """Lengths of the contexts that were read, in order."""
    lengths = []
    honest = SharedPrefix.build.__func__

    def counting(cls, model, token_ids, **options):
        lengths.append(token_ids.numel())
        return honest(cls, model, token_ids, **options)

    monkeypatch.setattr(SharedPrefix, "build", classmethod(counting))
    return lengths


def test_context_is_read_once(built):
    teacher = ContextTeacher(tiny_model(), random_ids(20, 4), path="merge")
    ids, bounds = pack(random_ids(5, 3))
    assert teacher.path == "merge"  # its check reads contexts of its own
    built.clear()
    for _ in range(3):
        teacher.hidden_states_packed(ids, bounds, context_index=[0, 1])
    assert built == [20, 4]


def test_only_contexts_that_a_call_continues_are_read(built):
    model = tiny_model()
    contexts = [torch.arange(1, length) for length in range(2, 42)]  # context i has i + 1 tokens
    teacher = ContextTeacher(model, contexts, path="merge")
    assert "not built yet" in teacher.explain()
    sequences = random_ids(5, 3, 4)
    ids, bounds = pack(sequences)
    for index, expected in (
        ([30, 7, 30], [8, 31]),
        ([7, 7, 30], []),
        ([39, 7, 0], [1, 40]),
    ):
        built.clear()
        got = teacher.hidden_states_packed(ids, bounds, context_index=index)
        assert built == expected
        assert_close(got, reference(model, contexts, sequences, index))
    assert "4 of 40 contexts built" in teacher.explain()

    built.clear()
    kept = teacher._prefixes[7]
    assert [len(prefix) for prefix in teacher.prefixes] == list(range(1, 41))
    assert len(built) == 36 and teacher.prefixes[7] is kept


def test_a_change_of_weights_forgets_all_contexts_and_reads_only_what_is_asked(built):
    model = tiny_model()
    contexts, sequences = random_ids(20, 6, 4), random_ids(5, 3)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, contexts, path="merge")
    assert len(teacher.prefixes) == 3
    for change in (lambda: model.model.layers[0].self_attn.k_proj.weight.mul_(1.5), teacher.invalidate):
        built.clear()
        with torch.no_grad():
            change()
        got = teacher.hidden_states_packed(ids, bounds, context_index=[1, 1])
        assert built == [6]
        assert_close(got, reference(model, contexts, sequences, [1, 1]))
        # The others were made with weights that are gone: they must not come back.
        got = teacher.hidden_states_packed(ids, bounds, context_index=[0, 2])
        assert built == [6, 20, 4]
        assert_close(got, reference(model, contexts, sequences, [0, 2]))

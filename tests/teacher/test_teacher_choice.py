"""Which path ContextTeacher takes, that errors planted in one are found, and that every layer reads the context."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from tiny_models import (
    assert_close,
    pack,
    random_ids,
    reference,
    tiny_model,
    told,
)

from opcd_fast.attention import dispatch as attention
from opcd_fast.models import seam
from opcd_fast.models.caches.expanded import ExpandedLayer
from opcd_fast.models.caches.prefix import FrozenLayer
from opcd_fast.teacher import ContextTeacher
from opcd_fast.teacher.paths import forward as teacher_paths
from opcd_fast.teacher.paths import verification

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
    assert [record.levelname for record in told(caplog)] == ["WARNING"]
    assert ("again for every sequence" in caplog.text) == (path == "concat")
    reason = "RoPE" if "rope" in name else model.config.model_type
    assert reason in caplog.text and reason in teacher.explain() and path in teacher.explain()
    with pytest.raises(ValueError, match=r"path='merge'.*use path='concat'"):
        ContextTeacher(model, [1, 2], path="merge")


def test_a_cache_argument_of_another_name_is_a_warning(monkeypatch, caplog):
    """What a library renames once more must not make every sequence read the context again, unsaid."""
    monkeypatch.setattr(seam, "takes_cache", lambda model: None)
    (context,), sequences = random_ids(20), random_ids(5, 3)
    teacher = ContextTeacher(model := tiny_model(), context)
    got = teacher.hidden_states_packed(*pack(sequences))
    assert_close(got, reference(model, [context], sequences, [0, 0]))
    assert teacher.path == "concat" and [record.levelname for record in told(caplog)] == ["WARNING"]
    assert "takes no cache" in caplog.text and "again for every sequence" in caplog.text


@pytest.mark.parametrize(("wrong", "path"), [(("merge",), "pad"), (("merge", "pad"), "concat")])
def test_planted_errors_step_down(wrong, path, monkeypatch, caplog):
    honest_merge, honest_update = attention.merge_by_logsumexp, ExpandedLayer.update
    if "merge" in wrong:
        monkeypatch.setattr(
            attention, "merge_by_logsumexp", lambda a, la, b, lb, **kw: honest_merge(a, la, b, lb + 0.01, **kw)
        )
    if "pad" in wrong:
        monkeypatch.setattr(ExpandedLayer, "update", lambda self, k, v, *_, **__: honest_update(self, k * 1.01, v))
    model = tiny_model()
    (context,), sequences = random_ids(20), random_ids(5, 3)
    ids, bounds = pack(sequences)
    with caplog.at_level(logging.WARNING, "opcd_fast"):
        teacher = ContextTeacher(model, context)
        got = teacher.hidden_states_packed(ids, bounds)
    assert teacher.path == path
    for step in wrong:
        assert f"not {step}: it failed its check" in teacher.explain()
    assert len(told(caplog)) == 1
    assert_close(got, reference(model, [context], sequences, [0, 0]))


def plant(error, monkeypatch):
    """An error in one path; which one, is the first word of its name."""
    if error == "merge: weights":
        honest_merge = attention.merge_by_logsumexp

        def off_by_a_hundredth(a, la, b, lb, **more):
            return honest_merge(a, la, b, lb + 0.01, **more)

        monkeypatch.setattr(attention, "merge_by_logsumexp", off_by_a_hundredth)
    elif error.endswith("a layer without its prefix"):
        layer = FrozenLayer if error.startswith("merge") else ExpandedLayer
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
                torch.cat([given.stream.layers[0][0][0].expand(len(key), -1, -1, -1), key], -2),
                torch.cat([given.stream.layers[0][0][1].expand(len(key), -1, -1, -1), value], -2),
            )
            return cache

        monkeypatch.setattr(teacher_paths, "expanded_cache", without_first)
    elif error == "pad: keys":
        honest_update = ExpandedLayer.update
        monkeypatch.setattr(ExpandedLayer, "update", lambda self, k, v, *_, **__: honest_update(self, k * 1.01, v))
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
    assert len(told(caplog)) == 1 and "'merge' could not be checked" in caplog.text
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
    assert len(told(caplog)) == 1 and "one sequence at a time" in caplog.text
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
    start = time.process_time()
    text, passed = verification.verify(body, path)
    assert time.process_time() - start < 1.0
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
    module = "opcd_fast.teacher.paths.choice"
    monkeypatch.setattr(f"{module}.verify", lambda body, path, *_: calls.append(path) or honest(body, path))
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
    honest = FrozenLayer.update
    calls = []

    def forgetful(self, key, value, *args, **kwargs):
        calls.append(1)
        return (key, value) if len(calls) == 2 else honest(self, key, value)

    monkeypatch.setattr(FrozenLayer, "update", forgetful)
    with pytest.raises(RuntimeError, match="layer 1 did not get its context"):
        teacher.hidden_states_packed(ids, bounds)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_layer_that_never_asks_for_its_prefix_is_an_error_on_pad(name, monkeypatch):
    model = tiny_model(name)
    teacher = ContextTeacher(model, random_ids(20)[0], path="pad")
    ids, bounds = pack(random_ids(5, 3))
    teacher.hidden_states_packed(ids, bounds)
    attend = model.model.layers[1].self_attn
    honest = attend.forward
    forget = {seam.takes_cache(model): None, "attention_mask": None}
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

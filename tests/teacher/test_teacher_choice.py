"""Which path ContextTeacher takes, that errors planted in one are found, and that every layer reads the context."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
from tiny_models import assert_close, pack, random_ids, reference, tiny_model, told

from opcd_fast.attention import PackedCall
from opcd_fast.models import seam
from opcd_fast.teacher import ContextTeacher
from opcd_fast.teacher.paths import choice, forward, verification

(CONTEXT,), SEQUENCES = random_ids(20), random_ids(5, 3)
IDS, BOUNDS = pack(SEQUENCES)


def expected(model):
    return reference(model, [CONTEXT], SEQUENCES, [0, 0])


@pytest.mark.parametrize(("name", "path"), [("falcon", "pad"), ("bloom", "pad"), ("llama-dynamic-rope", "concat")])
def test_other_architectures_take_another_path_and_say_so(name, path, caplog):
    model = tiny_model(name)
    teacher = ContextTeacher(model, CONTEXT)
    for _ in range(2):
        teacher.hidden_states_packed(IDS, BOUNDS)
    assert teacher.path == path and [record.levelname for record in told(caplog)] == ["WARNING"]
    assert ("again for every sequence" in caplog.text) == (path == "concat")
    reason = "RoPE" if "rope" in name else model.config.model_type
    assert reason in caplog.text and reason in teacher.explain() and path in teacher.explain()
    with pytest.raises(ValueError, match=r"path='merge'.*use path='concat'"):
        ContextTeacher(model, [1, 2], path="merge")


def test_a_cache_argument_of_another_name_is_a_warning(monkeypatch, caplog):
    """What a library renames once more must not make every sequence read the context again, unsaid."""
    monkeypatch.setattr(seam, "takes_cache", lambda model: None)
    teacher = ContextTeacher(model := tiny_model(), CONTEXT)
    assert_close(teacher.hidden_states_packed(IDS, BOUNDS), expected(model))
    assert teacher.path == "concat" and [record.levelname for record in told(caplog)] == ["WARNING"]
    assert "takes no cache" in caplog.text and "again for every sequence" in caplog.text


# --- the check at first use ---------------------------------------------------------------------------------


def in_attention(monkeypatch, change):
    """On path merge every layer's attention gets change(query, window)."""
    honest = PackedCall.attend

    def wrong(self, layer, query, *rest, **options):
        query, options["sliding_window"] = change(query, options.get("sliding_window"))
        return honest(self, layer, query, *rest, **options)

    monkeypatch.setattr(PackedCall, "attend", wrong)


def in_cache(monkeypatch, kind, method, change, layers=slice(None)):
    """Some layers' `method` of the cache that `kind` makes returns change(result, *arguments)."""
    honest = getattr(forward, kind)

    def wrong(*args):
        cache = honest(*args)
        for layer in cache.layers[layers]:
            inner = getattr(layer, method)
            setattr(layer, method, lambda *args, inner=inner, **options: change(inner(*args, **options), *args))
        return cache

    monkeypatch.setattr(forward, kind, wrong)


def in_positions(monkeypatch):
    honest = seam.run_body

    def shifted(body, ids, *, position_ids=None, **options):
        return honest(body, ids, position_ids=None if position_ids is None else position_ids + 1, **options)

    monkeypatch.setattr(seam, "run_body", shifted)


WINDOWED = "mistral-window-below-context"
ERRORS = {  # the path, a model, and what is wrong there
    "scores": ("merge", "llama", lambda m: in_attention(m, lambda q, window: (q * 1.01, window))),
    "a window": ("merge", WINDOWED, lambda m: in_attention(m, lambda q, window: (q, window and window - 1))),
    "keys": ("pad", "llama", lambda m: in_cache(m, "expanded_cache", "update", lambda kv, *_: (kv[0] * 1.01, kv[1]))),
    "no keys": ("pad", "llama", lambda m: in_cache(m, "expanded_cache", "update", lambda kv, key, v, *_: (key, v))),
    "rows of a window": (
        "pad", WINDOWED, lambda m: in_cache(m, "expanded_cache", "get_mask_sizes", lambda sizes, _: (sizes[0], 0))
    ),
    "positions": ("pad", "llama", in_positions),
    "learned positions": ("pad", "gpt2", in_positions),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_a_path_that_is_wrong_is_refused_or_stepped_down_from(error, monkeypatch, caplog):
    path, name, plant = ERRORS[error]
    model = tiny_model(name)
    assert "asked for; it matches concat" in ContextTeacher(model, CONTEXT, path=path).explain()
    if path == "pad":
        monkeypatch.setattr(choice, "refuses_merge", lambda body: "not tried")
    with monkeypatch.context() as patch:
        plant(patch)
        asked = ContextTeacher(model, CONTEXT, path=path)  # nothing runs yet
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"path='{path}': it failed its check .*\(.+\); use path='auto'"):
                asked.hidden_states_packed(IDS, BOUNDS)
        teacher = ContextTeacher(model, CONTEXT)
        assert teacher.path == {"merge": "pad", "pad": "concat"}[path]
        assert f"not {path}: it failed its check" in teacher.explain() and len(told(caplog)) == 1
        got = teacher.hidden_states_packed(IDS, BOUNDS)
    assert_close(got, expected(model))


def test_a_padded_batch_that_is_wrong_runs_one_by_one(monkeypatch, caplog):
    """CPM-Ant, for one, takes padding for text."""
    honest = forward.padded_forward
    monkeypatch.setattr(
        forward, "padded_forward", lambda body, ids, row: honest(body, ids, row) * (1.01 if row.ragged else 1.0)
    )
    teacher = ContextTeacher(model := tiny_model(), CONTEXT, path="concat")
    for _ in range(2):
        assert_close(teacher.hidden_states_packed(IDS, BOUNDS), expected(model))
    assert len(told(caplog)) == 1 and "one sequence at a time" in caplog.text
    assert "one at a time" in teacher.explain()


@pytest.mark.parametrize(("asked", "path"), [("auto", "concat"), ("merge", "merge")])
def test_a_model_that_cannot_be_tried(asked, path, monkeypatch, caplog):
    """What was asked for runs and says so; what was not goes through concat."""

    def fail(*args, **kwargs):
        raise ValueError("a small model of this kind still has 99 parameters")

    monkeypatch.setattr(verification, "twin_of", fail)
    teacher = ContextTeacher(model := tiny_model(), CONTEXT, path=asked)
    assert_close(teacher.hidden_states_packed(IDS, BOUNDS), expected(model))
    assert teacher.path == path and "still has 99 parameters" in teacher.explain()
    assert ("'merge' could not be checked" if path == "merge" else "path 'concat'") in told(caplog)[0].getMessage()


@pytest.mark.parametrize("path", ["merge", "pad"])
def test_the_check_is_quick_and_leaves_the_random_state_alone(path):
    state = torch.random.get_rng_state()
    start = time.process_time()
    text, passed = verification.verify(seam.body_of(tiny_model(WINDOWED)), path)
    assert time.process_time() - start < 1.0
    assert passed and "fp32" in text
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_check_runs_once_and_not_before_first_use(monkeypatch):
    calls, honest = [], verification.verify
    monkeypatch.setattr(choice, "verify", lambda body, path, *_: calls.append(path) or honest(body, path))
    teacher = ContextTeacher(tiny_model(), CONTEXT)
    assert not calls
    for _ in range(2):
        teacher.hidden_states_packed(IDS, BOUNDS)
    assert calls == ["merge"] and "matches concat" in teacher.explain()
    assert "kernels: phase 1 CPU flash, phase 2 CPU flash, merge torch" in teacher.explain()


@pytest.mark.parametrize("place", [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul])
def test_whatever_float32_products_do_elsewhere(place):
    """As transformers sets it for `tf32=True`; torch's older getter raises from then on."""
    before = place.fp32_precision
    try:
        place.fp32_precision = "tf32"
        teacher = ContextTeacher(model := tiny_model(), CONTEXT)
        got = teacher.hidden_states_packed(IDS, BOUNDS)
        assert place.fp32_precision == "tf32"
    finally:
        place.fp32_precision = before
    assert teacher.path == "merge", teacher.explain()
    assert (got - expected(model)).norm() <= 1e-2 * got.norm()


def test_under_autocast():
    exact, precision = expected(model := tiny_model()), torch.get_float32_matmul_precision()
    with torch.autocast("cpu", torch.bfloat16):
        teacher = ContextTeacher(model, CONTEXT)
        got = teacher.hidden_states_packed(IDS, BOUNDS)
        stock = ContextTeacher(model, CONTEXT, path="concat").hidden_states_packed(IDS, BOUNDS)
    assert teacher.path == "merge", teacher.explain()  # the check itself runs in fp32
    assert torch.get_float32_matmul_precision() == precision
    assert (got - exact).norm() <= 1.25 * (stock - exact).norm()


# --- every layer reads the context --------------------------------------------------------------------------


def forgets_its_keys(patch, teacher):
    in_cache(patch, "prefix_cache", "update", lambda _, key, value, *__: (key.clone(), value), slice(1, 2))


def loses_its_cache(patch, teacher):
    honest = seam.run_body
    patch.setattr(seam, "run_body", lambda *args, cache=None, **options: honest(*args, **options))


def attends_by_itself(patch, teacher):
    teacher.invalidate()
    patch.setattr(seam, "using_attention", lambda *_: nullcontext)


def never_asks(patch, teacher):
    attend = teacher.model.model.layers[1].self_attn
    honest, forget = attend.forward, {seam.takes_cache(teacher.model): None, "attention_mask": None}
    patch.setattr(attend, "forward", lambda *args, **options: honest(*args, **{**options, **forget}))


@pytest.mark.parametrize(
    ("path", "name", "fault", "message"),
    [
        ("merge", "llama", forgets_its_keys, "layer 1 did not get its context"),
        ("merge", "llama", loses_its_cache, "layer 0 did not get its context"),
        ("merge", "llama", attends_by_itself, r"layers \[0, 1, 2\] did not read the context"),
        ("pad", "llama", never_asks, r"layers \[1\] did not read the context"),
        ("pad", "gemma2", never_asks, r"layers \[1\] did not read the context"),
    ],
)
def test_a_layer_without_its_context_is_an_error(path, name, fault, message, monkeypatch):
    teacher = ContextTeacher(tiny_model(name), CONTEXT, path=path)
    teacher.hidden_states_packed(IDS, BOUNDS)
    fault(monkeypatch, teacher)
    with pytest.raises(RuntimeError, match=message):
        teacher.hidden_states_packed(IDS, BOUNDS)

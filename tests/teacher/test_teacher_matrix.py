"""Every architecture: which path the teacher takes, and that the path gives the numbers of a plain forward."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from architectures import ARCHITECTURES, MERGE, WINDOW, build, walk
from tiny_models import pack, plain_after_context, random_ids, told
from transformers import AutoModelForCausalLM, Gemma3Config

from opcd_fast.attention import PackedCall
from opcd_fast.models import seam
from opcd_fast.teacher import ContextTeacher, context_teacher
from opcd_fast.teacher.paths import choice, verification
from opcd_fast.teacher.paths import twin as tiny_twin

TOLERANCE = 1e-4

# What `auto` must choose where it is not merge. A silent step down is a failing test.
# fmt: off
PAD = [  # none of these is known to run exactly on a packed row
    "llama4", "bloom", "mpt", "falcon", "falcon-alibi", "qwen3-next", "qwen3.5", "falcon-h1", "bamba",
    "granite-hybrid", "nemotron-h", "nemotron-h-moe", "zamba2", "lfm2", "lfm2-moe", "qwen3.5-moe", "olmo-hybrid",
]
CONCAT = {  # and why not pad
    "llama-dynamic": "RoPE type 'dynamic'",
    "deepseek-v32": "keep more than keys and values (DynamicIndexedLayer)",
    "mamba2": "not known to go on from a cached state",
    "jamba": "not known to go on from a cached state",
    "recurrent-gemma": "not known to go on from a cached state",
    "minimax": "not known to go on from a cached state",
}
# fmt: on
WALK = walk([*MERGE, *PAD, *CONCAT])
WINDOWED = [p for p in WALK if {"sliding_window", "attention_chunk_size"} & set(vars(ARCHITECTURES[p.values[0]]()))]

LENGTHS, INDEX = (5, 1, 17, 4, 9), [1, 0, 2, 0, 1]


def contexts():
    return random_ids(20, 6, 0)


def plain(model, sequences, index=INDEX, contexts_=None):
    """Each sequence alone after its context: nothing of ours, no batch, no padding."""
    contexts_ = contexts_ or contexts()
    return torch.cat([plain_after_context(model, contexts_[i], s) for s, i in zip(sequences, index, strict=True)])


def largest_error(model, path="auto"):
    sequences = random_ids(*LENGTHS, seed=2)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, contexts(), path=path)
    got = teacher.hidden_states_packed(ids, bounds, context_index=INDEX)
    return teacher, float((got - plain(model, sequences)).abs().max())


def test_the_lists_name_every_architecture_once():
    assert sorted([*MERGE, *PAD, *CONCAT]) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("name", WALK)
def test_path_and_numbers(name):
    model = build(name)
    expected = "merge" if name in MERGE else "pad" if name in PAD else "concat"
    teacher, error = largest_error(model)
    assert teacher.path == expected, teacher.explain()
    assert error <= TOLERANCE
    if expected != "merge":
        assert CONCAT.get(name, "not known to run exactly on a packed row") in teacher.explain()
        with pytest.raises(ValueError, match="path='merge'"):
            ContextTeacher(model, contexts(), path="merge")
    if expected == "concat":
        with pytest.raises(ValueError, match="path='pad'"):
            ContextTeacher(model, contexts(), path="pad")
    else:
        assert largest_error(model, "pad")[1] <= TOLERANCE
    sequences = random_ids(*LENGTHS, seed=2)
    without = plain(model, sequences, contexts_=[torch.zeros(0, dtype=torch.int64)] * 3)
    assert (without - plain(model, sequences)).abs().max() > 0.1  # the context matters


@pytest.mark.parametrize("name", WINDOWED)
def test_window_larger_than_the_context(name):
    config = ARCHITECTURES[name]()
    names = [n for n in ("sliding_window", "attention_chunk_size") if seam.setting(config, n) == WINDOW]
    model = build(name, **dict.fromkeys(names, 60))
    teacher, error = largest_error(model)
    assert teacher.path == ("merge" if name in MERGE else "pad" if name in PAD else "concat")
    assert error <= TOLERANCE


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_newer_falcon(kv_heads):
    model = build("falcon", new_decoder_architecture=True, multi_query=False, num_kv_heads=kv_heads)
    teacher, error = largest_error(model)
    assert teacher.path == "pad" and error <= TOLERANCE  # its small twin has as many heads to a key


def test_the_language_model_of_a_model_that_sees_images():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=ARCHITECTURES["gemma3"](), vision_config={**vision, "image_size": 28})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    teacher, error = largest_error(model)  # the oracle runs the whole model
    assert teacher.path == "merge" and error <= TOLERANCE
    assert teacher.head.weight is model.get_output_embeddings().weight


# --- traps --------------------------------------------------------------------------------------------------
# Each shows what goes wrong without its guard.


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_longrope_that_crosses_its_switch(path, caplog):
    """It switches at 24 tokens; a context of 20, sequences that end at 22 and at 37."""
    model, context, sequences = build("phi3-longrope"), random_ids(20), random_ids(2, 17, seed=2)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, context, path=path)
    expected = plain(model, sequences, [0, 0], context)
    with caplog.at_level(logging.WARNING, "opcd_fast"):
        for _ in range(2):
            got = teacher.hidden_states_packed(ids, bounds)
            assert (got - expected).abs().max() <= TOLERANCE
    assert len(told(caplog)) == (path != "concat")
    assert teacher.path == path and ("24 tokens" in teacher.explain()) == (path != "concat")


@pytest.mark.parametrize("path", ["merge", "pad"])
@pytest.mark.parametrize(("context", "lengths"), [(10, (5, 14)), (30, (1, 9)), (0, (24, 3)), (0, (25, 40))])
def test_longrope_on_one_side_of_its_switch_needs_no_concat(path, context, lengths, monkeypatch):
    model, contexts_, sequences = build("phi3-longrope"), random_ids(context), random_ids(*lengths, seed=2)
    monkeypatch.setattr(context_teacher, "concat_forward", None)
    got = ContextTeacher(model, contexts_, path=path).hidden_states_packed(*pack(sequences))
    assert (got - plain(model, sequences, [0, 0], contexts_)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("name", "setting"), [("gemma2", "attn_logit_softcapping"), ("gpt-oss", "sinks")])
def test_sdpa_that_drops_a_part_of_the_model_is_refused(name, setting):
    model = build(name)
    model.config._attn_implementation_internal = "sdpa"
    for path in ("auto", "pad", "concat"):
        with pytest.raises(ValueError, match="sdpa attention drops.*attn_implementation='eager'"):
            ContextTeacher(model, contexts(), path=path)


@pytest.mark.parametrize(("name", "dropped"), [("gemma2", "softcap"), ("gpt-oss", "s_aux")])
def test_caps_and_sinks_reach_packed_attention(name, dropped, monkeypatch):
    honest = PackedCall.attend

    def without(*args, **kwargs):
        assert kwargs[dropped] is not None
        return honest(*args, **{**kwargs, dropped: None})

    monkeypatch.setattr(PackedCall, "attend", without)
    with pytest.raises(ValueError, match="path='merge': it failed its check"):
        largest_error(build(name), "merge")
    teacher, error = largest_error(build(name))
    assert teacher.path == "pad" and "not merge: it failed its check" in teacher.explain() and error <= TOLERANCE


@pytest.mark.parametrize("name", ["llama4", "bloom"])
def test_what_packing_gets_wrong_is_seen_by_the_check(name, monkeypatch):
    # Chunks and scales by position (Llama-4), attention outside of the interface (Bloom).
    monkeypatch.setattr(choice, "refuses_merge", lambda body: None)
    teacher, error = largest_error(build(name))
    assert teacher.path == "pad" and "merge: it failed its check" in teacher.explain() and error <= TOLERANCE


def test_a_scan_that_starts_anew_is_refused(monkeypatch):
    monkeypatch.setattr(choice, "refuses_pad", lambda body: None)
    teacher, error = largest_error(build("jamba"))
    assert teacher.path == "concat" and "not pad: it failed its check" in teacher.explain()
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen3-next", "falcon-h1", "zamba2", "lfm2"])
def test_recurrent_state_is_copied_for_every_call(name):
    """Layers overwrite the state they are given."""
    model = build(name)
    ids, bounds = pack(random_ids(*LENGTHS, seed=2))
    teacher = ContextTeacher(model, contexts(), path="pad")
    first = teacher.hidden_states_packed(ids, bounds, context_index=INDEX)
    assert torch.equal(teacher.hidden_states_packed(ids, bounds, context_index=INDEX), first)
    assert any(teacher.prefixes[0].states)


@pytest.mark.parametrize("name", ["qwen3-next", "bamba", "lfm2"])
def test_a_recurrent_layer_that_gets_no_state_is_an_error(name, monkeypatch):
    model = build(name)
    teacher = ContextTeacher(model, contexts(), path="pad")
    _ = teacher.prefixes
    layer = model.model.layers[0]
    honest, forget = layer.forward, {seam.takes_cache(model): None}
    monkeypatch.setattr(layer, "forward", lambda *args, **options: honest(*args, **{**options, **forget}))
    for tokens in (1, 5):
        with pytest.raises(RuntimeError, match=r"layers \[0\] did not read the context"):
            teacher.hidden_states(random_ids(tokens)[0].unsqueeze(0), context_index=[0])


# --- the check at first use, at real sizes ------------------------------------------------------------------


NO_ATTENTION_BY_DEFAULT = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granite-hybrid": {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4},
    "lfm2-moe": {"layer_types": (["conv"] * 3 + ["full_attention"]) * 8},
}


@pytest.mark.parametrize("name", [p for p in WALK if p.values[0] not in CONCAT])
def test_a_small_twin_of_a_model_of_default_size_agrees(name):
    eager = {"attn_implementation": "eager"} if name == "gemma2" else {}
    config = type(ARCHITECTURES[name]())(**eager, **NO_ATTENTION_BY_DEFAULT.get(name, {}))
    with torch.device("meta"):
        body = seam.body_of(AutoModelForCausalLM.from_config(config))
    cpu = torch.device("cpu")
    start = time.process_time()
    for window in (5, 4096):
        twin = tiny_twin.twin_of(type(body), config, cpu, window=window)
        with torch.no_grad():
            got, oracle = verification.both("merge" if name in MERGE else "pad", twin, cpu)
        assert (got - oracle).abs().max() <= TOLERANCE
    assert time.process_time() - start < 2.0  # the bound on a real first use is one second; CI machines are slow


def test_one_token_goes_through_recurrent_layers_like_many():
    """Nemotron-H bounds its time step in the scan, and not in the way that one token alone takes."""
    model = build("nemotron-h")
    teacher = ContextTeacher(model, contexts := random_ids(*[9] * 12), path="pad")
    sequences = random_ids(*[1] * 12, seed=4)
    ids, bounds = pack(sequences)
    got = teacher.hidden_states_packed(ids, bounds, context_index=range(12))
    want = [plain_after_context(model, c, s) for c, s in zip(contexts, sequences, strict=True)]
    torch.testing.assert_close(got, torch.cat(want), atol=TOLERANCE, rtol=0)

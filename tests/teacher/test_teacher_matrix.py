"""Every architecture: which path the teacher takes, and that the path gives the numbers of a plain forward."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from architectures import ARCHITECTURES, WINDOW, build
from tiny_models import pack, plain_after_context, plain_hidden, random_ids, told
from transformers import AutoModelForCausalLM, Gemma3Config

from opcd_fast.attention import PackedCall
from opcd_fast.models import architectures, packed_hidden_states, seam
from opcd_fast.models import packed as student
from opcd_fast.models.caches import expanded as expanded_cache
from opcd_fast.teacher import ContextTeacher
from opcd_fast.teacher.paths import twin as tiny_twin
from opcd_fast.teacher.paths import verification

TOLERANCE = 1e-4

# What `auto` must choose. A silent step down is a failing test.
# fmt: off
MERGE = [
    "llama", "qwen2", "qwen3", "mistral-window", "olmo", "olmo2", "olmo3", "smollm3", "phi", "phi3", "phi3-window",
    "phi3-longrope", "llama3-rope", "yarn", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gemma", "gemma3",
    "gemma3n", "gemma4", "gemma4-shared-kv", "granite", "glm", "glm4", "cohere", "cohere2", "starcoder2",
    "starcoder2-window", "exaone4", "stablelm", "gpt-neox", "gemma2", "gpt-oss", "gpt2", "opt", "deepseek-v3",
]
PAD = [  # none of these is known to run exactly on a packed row
    "llama4", "bloom", "mpt", "falcon", "falcon-alibi", "qwen3-next", "qwen3.5", "falcon-h1", "bamba",
    "granite-hybrid", "nemotron-h", "zamba2", "lfm2", "lfm2-moe", "qwen3.5-moe", "olmo-hybrid",
]
CONCAT = {  # and why not pad
    "llama-dynamic": "RoPE type 'dynamic'",
    "deepseek-v32": "keep more than keys and values (DynamicIndexedLayer)",
    "mamba2": "not known to go on from a cached state",
    "jamba": "not known to go on from a cached state",
    "recurrent-gemma": "not known to go on from a cached state",
    "minimax": "not known to go on from a cached state",
}
# One member of every mechanism; the others are walked with -m slow.
MECHANISMS = {
    "qwen3", "mistral-window", "olmo3", "smollm3", "phi3-longrope", "yarn", "qwen3-moe", "gemma3",
    "gemma4-shared-kv", "granite", "stablelm", "gemma2", "gpt-oss", "gpt2", "deepseek-v3", "falcon", "llama4",
    "bloom", "falcon-alibi", "mpt", "llama-dynamic", "deepseek-v32", "qwen3-next", "falcon-h1", "bamba", "zamba2",
    "lfm2", "mamba2", "jamba",
}
# fmt: on
WALK = [pytest.param(n, marks=() if n in MECHANISMS else pytest.mark.slow) for n in (*MERGE, *PAD, *CONCAT)]
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


def test_the_path_that_is_gone_is_an_error_that_names_another():
    with pytest.raises(ValueError, match="path: expected .*'mask'.*'pad'"):
        ContextTeacher(build("falcon"), contexts(), path="mask")


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_newer_falcon(kv_heads):
    model = build("falcon", new_decoder_architecture=True, multi_query=False, num_kv_heads=kv_heads)
    teacher, error = largest_error(model)
    assert teacher.path == "pad" and error <= TOLERANCE  # its small twin has as many heads to a key


@pytest.mark.parametrize("name", [p for p in WALK if p.values[0] in MERGE])
def test_the_student_packs_what_merges(name):
    model = build(name)
    reason = architectures.refuses_packing(seam.body_of(model))
    assert (reason is None) == (name != "phi3-longrope"), reason
    sequences = random_ids(*LENGTHS, seed=2)
    got = packed_hidden_states(model, *pack(sequences))
    alone = plain(model, sequences, contexts_=[torch.zeros(0, dtype=torch.int64)] * 3)
    assert (got - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "deepseek-v3", "opt"])
def test_gradients_of_the_student(name):
    model, sequences = build(name), random_ids(*LENGTHS, seed=2)
    gradients = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            hidden = packed_hidden_states(model, *pack(sequences))
        else:
            hidden = torch.cat([plain_hidden(model, s) for s in sequences])
        # Not the sum of squares: the final norm holds that constant.
        (hidden * torch.linspace(-1.0, 1.0, hidden.shape[-1]).sin()).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert name != "gpt-oss" or any(n.endswith("sinks") and g.abs().max() > 0.01 for n, g in gradients[0].items())
    for parameter, expected in gradients[1].items():
        # The bias of keys has no gradient but rounding: it adds the same to all scores.
        assert (gradients[0][parameter] - expected).norm() <= 1e-4 * expected.norm() + 1e-5, parameter


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_dropout_with_caps_or_sinks_is_left_to_the_model(name, caplog, monkeypatch):
    monkeypatch.setattr(student, "_told", set())
    model = build(name, attention_dropout=0.5)
    ids, bounds = pack(random_ids(*LENGTHS, seed=2))
    still = packed_hidden_states(model, ids, bounds)
    assert not told(caplog)
    model.train()
    assert not torch.allclose(packed_hidden_states(model, ids, bounds), still)
    assert "attention_dropout=0.5" in caplog.text


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


def crossing():
    """Phi-3 with longrope that switches at 24 tokens; a context of 20, sequences that end at 22 and at 37."""
    return build("phi3-longrope"), random_ids(20), random_ids(2, 17, seed=2)


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_longrope_that_crosses_its_switch(path, caplog):
    model, context, sequences = crossing()
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
    monkeypatch.setattr("opcd_fast.teacher.context_teacher.concat_forward", None)
    got = ContextTeacher(model, contexts_, path=path).hidden_states_packed(*pack(sequences))
    assert (got - plain(model, sequences, [0, 0], contexts_)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("path", ["merge", "pad"])
def test_longrope_without_the_guard_is_wrong(path, monkeypatch):
    model, context, sequences = crossing()
    monkeypatch.setattr("opcd_fast.teacher.paths.choice.PathChoice.for_call", lambda self, *_: self.path)
    got = ContextTeacher(model, context, path=path).hidden_states_packed(*pack(sequences))
    assert (got - plain(model, sequences, [0, 0], context)).abs().max() > 0.1


def test_longrope_in_one_batch_is_wrong(monkeypatch):
    # A sequence that crosses moves the positions of the others in its batch.
    model, context, sequences = crossing()
    monkeypatch.setattr("opcd_fast.teacher.paths.forward.moving_rope", lambda body: [])
    got = ContextTeacher(model, context, path="concat").hidden_states_packed(*pack(sequences))
    assert (got - plain(model, sequences, [0, 0], context)).abs().max() > 0.1


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


def test_explain_names_the_kernels():
    kernels = ContextTeacher(build("gpt-oss"), contexts()).explain().splitlines()[-1]
    assert kernels == (
        "kernels: phase 1 CPU flash, phase 2 CPU flash, merge torch with sinks; windowed layers: blocked per sequence"
    )
    assert "phase 2 blocked, with softcap" in ContextTeacher(build("gemma2"), contexts()).explain()
    assert "kernels" not in ContextTeacher(build("falcon"), contexts()).explain()


@pytest.mark.parametrize(("name", "path"), [("llama4", "merge"), ("llama4", "auto"), ("bloom", "auto")])
def test_what_packing_gets_wrong_is_refused(name, path, monkeypatch):
    # Chunks and scales by position (Llama-4), attention outside of the interface (Bloom).
    monkeypatch.setattr("opcd_fast.teacher.paths.choice.refuses_merge", lambda body: None)
    if path == "merge":
        with pytest.raises(ValueError, match="path='merge': it failed its check"):
            largest_error(build(name), path)
    else:  # without the list, the check at first use still sees it
        teacher, error = largest_error(build(name), path)
        assert teacher.path == "pad" and "merge: it failed its check" in teacher.explain() and error <= TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "llama4", "llama"])
def test_pad_passes_positions(name, monkeypatch):
    # Learned positions (GPT-2) and scales by position (Llama-4) count from the start of the context.
    model = build(name)
    honest, shift = seam.run_body, [0]

    def run(body, input_ids, *, position_ids=None, **options):
        positions = None if position_ids is None else position_ids + shift[0]
        return honest(body, input_ids, position_ids=positions, **options)

    monkeypatch.setattr(seam, "run_body", run)
    assert largest_error(model, "pad")[1] <= TOLERANCE
    shift[0] = 1
    with pytest.raises(ValueError, match="path='pad': it failed its check"):
        largest_error(model, "pad")


def test_a_scan_that_starts_anew_is_refused(monkeypatch):
    name = "jamba"
    monkeypatch.setattr("opcd_fast.teacher.paths.choice.refuses_pad", lambda body: None)
    with pytest.raises(ValueError, match="path='pad': it failed its check"):
        largest_error(build(name), "pad")
    teacher, error = largest_error(build(name))
    assert teacher.path == "concat" and "not pad: it failed its check" in teacher.explain()
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen3-next", "falcon-h1", "zamba2", "lfm2"])
def test_recurrent_state_is_copied_for_every_call(name, monkeypatch):
    # Layers overwrite the state they are given.
    model = build(name)
    ids, bounds = pack(random_ids(*LENGTHS, seed=2))
    teacher = ContextTeacher(model, contexts(), path="pad")
    first = teacher.hidden_states_packed(ids, bounds, context_index=INDEX)
    assert torch.equal(teacher.hidden_states_packed(ids, bounds, context_index=INDEX), first)
    assert any(teacher.prefixes[0].states)

    honest = torch.Tensor.repeat
    monkeypatch.setattr(torch.Tensor, "repeat", lambda x, b, *more: x if b == 1 else honest(x, b, *more))
    one = random_ids(7)[0].unsqueeze(0)
    states = [teacher.hidden_states(one, context_index=[0]) for _ in range(2)]
    assert not torch.equal(*states)


@pytest.mark.parametrize("name", ["qwen3-next", "bamba", "lfm2"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_recurrent_layer_that_gets_no_state_is_an_error(name, tokens, monkeypatch):
    model = build(name)
    teacher = ContextTeacher(model, contexts(), path="pad")
    one = random_ids(tokens)[0].unsqueeze(0)
    teacher.hidden_states(one, context_index=[0])
    layer = model.model.layers[0]
    honest = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kw: honest(*args, **{**kw, seam.takes_cache(model): None}))
    with pytest.raises(RuntimeError, match=r"layers \[0\] did not read the context"):
        teacher.hidden_states(one, context_index=[0])


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


def test_wrong_rows_of_a_windowed_cache_are_seen(monkeypatch):
    # A windowed layer keeps the last W - 1 positions; a mask that starts elsewhere shifts every key.
    model = build("mistral-window")
    honest = expanded_cache.ExpandedLayer.get_mask_sizes
    monkeypatch.setattr(expanded_cache.ExpandedLayer, "get_mask_sizes", lambda self, q: (honest(self, q)[0], 0))
    with pytest.raises(ValueError, match="path='pad': it failed its check"):
        largest_error(model, "pad")


def test_one_token_goes_through_recurrent_layers_like_many():
    """Nemotron-H bounds its time step in the scan, and not in the way that one token alone takes."""
    model = build("nemotron-h")
    teacher = ContextTeacher(model, contexts := random_ids(*[9] * 12), path="pad")
    sequences = random_ids(*[1] * 12, seed=4)
    ids, bounds = pack(sequences)
    got = teacher.hidden_states_packed(ids, bounds, context_index=range(12))
    want = [plain_after_context(model, c, s) for c, s in zip(contexts, sequences, strict=True)]
    torch.testing.assert_close(got, torch.cat(want), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gpt-oss", "gemma2"])
def test_no_context_at_all(name):
    model, sequences = build(name), random_ids(5, 1, 12)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, [[], []])
    assert teacher.path == "merge"
    got = teacher.hidden_states_packed(ids, bounds, context_index=[1, 0, 0])
    want = torch.cat([plain_hidden(model, s) for s in sequences])
    torch.testing.assert_close(got, want.detach(), atol=TOLERANCE, rtol=0)

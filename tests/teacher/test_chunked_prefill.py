"""A context read in chunks, or after a part of it: the same prefix as in one pass, at a bounded peak of memory."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from memory_record import peak_bytes
from tiny_models import CONFIGS, UNPACKABLE, random_ids, tiny_model

from opcd_fast.models import seam
from opcd_fast.models.caches import GrowingLayer
from opcd_fast.teacher import ContextTeacher
from opcd_fast.teacher.prefix import SharedPrefix, chunked_prefill

TOLERANCE = 1e-5  # relative to the largest value


def assert_same_prefix(a, b):
    assert torch.equal(a.token_ids, b.token_ids) and a.nbytes == b.nbytes
    pairs = [*zip(a.keys, b.keys, strict=True), *zip(a.values, b.values, strict=True)]
    for x, y in [*pairs, (a.last_hidden_state, b.last_hidden_state)]:
        assert x.shape == y.shape and x.dtype == y.dtype
        assert (x - y).abs().max() <= TOLERANCE * max(1.0, float(y.abs().max()))


def tokens_run(model):
    """A list that receives the number of tokens of every pass through the body."""
    counts = []

    def count(_, args, kwargs):
        counts.append(kwargs["input_ids"].numel())

    seam.body_of(model).register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_equal_one_pass(name):
    model = tiny_model(name)
    (context,) = random_ids(41)
    whole = SharedPrefix.build(model, context, chunk_tokens=0)
    counts = tokens_run(model)
    for chunk in (1, 9, 40):  # below and above the window of 8, and a last chunk of one token
        counts.clear()
        prefix = SharedPrefix.build(model, context, chunk_tokens=chunk)
        assert_same_prefix(prefix, whole)
        assert max(counts) == chunk and sum(counts) == 41
        for x in (*prefix.keys, *prefix.values):
            assert x.untyped_storage().nbytes() == x.numel() * 4 and not x.requires_grad


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed-window"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_chunks_are_as_close_to_fp32_as_one_pass(name, autocast):
    model, (context,) = tiny_model(name), random_ids(100)
    exact = SharedPrefix.build(model, context, chunk_tokens=0)
    if not autocast:
        model.bfloat16()
    errors = {}
    for chunk in (0, 16):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prefix = SharedPrefix.build(model, context, chunk_tokens=chunk)
        errors[chunk] = sum(
            float((a.bfloat16().float() - b).norm() / b.norm())  # in the type in which attention reads them
            for a, b in zip((*prefix.keys, *prefix.values), (*exact.keys, *exact.values), strict=True)
        )
    assert 0 < errors[16] <= 1.25 * errors[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("first", [1, 6, 7, 30])
def test_extending_a_prefix_equals_one_pass(name, first):
    model = tiny_model(name)
    (context,) = random_ids(41)
    start = SharedPrefix.build(model, context[:first])
    kept = [x.clone() for x in (*start.keys, *start.values)]
    counts = tokens_run(model)
    for chunk in (None, 4):
        counts.clear()
        prefix = SharedPrefix.build(model, context, after=start, chunk_tokens=chunk)
        assert sum(counts) == 41 - first
        assert_same_prefix(prefix, SharedPrefix.build(tiny_model(name), context, chunk_tokens=0))
        assert all(torch.equal(x, y) for x, y in zip((*start.keys, *start.values), kept, strict=True))
    assert SharedPrefix.build(model, context[:first], after=start) is start
    empty = SharedPrefix.build(model, context[:0])
    assert_same_prefix(SharedPrefix.build(model, context, after=empty), prefix)


def test_a_negative_chunk_is_refused():
    with pytest.raises(ValueError, match="chunk_tokens: .* got -1"):
        SharedPrefix.build(tiny_model(), random_ids(3)[0], chunk_tokens=-1)


def test_what_cannot_be_extended_is_refused():
    model, (context,) = tiny_model(), random_ids(20)
    start, other = SharedPrefix.build(model, context[:6]), context.clone()
    other[2] += 1
    unpackable = tiny_model("falcon")
    for of, tokens, after, options, reason in (
        (model, other, start, {}, "its 6 tokens are not the first of token_ids"),
        (model, context[:4], start, {}, "its 6 tokens are not the first"),
        (tiny_model("qwen3"), context, start, {}, "has no keys of this model"),
        (model, context, SharedPrefix.build(model, context[:6], keep_kv=False), {}, "has no keys"),
        (model, context, start, {"keep_kv": False}, "cannot be extended here, because all keys"),
        (model, context, start, {"chunk_tokens": 0}, "cannot be extended here, because all keys"),
        (unpackable, context, SharedPrefix.build(unpackable, context[:6]), {}, "cannot be extended here, because arch"),
    ):
        with pytest.raises(ValueError, match=f"after: .*{reason}"):
            SharedPrefix.build(of, tokens, after=after, **options)


def with_longrope():
    """A Llama that says it has such RoPE; only what it says is looked at."""
    model = tiny_model()
    model.config.rope_parameters = {"full_attention": {"rope_type": "longrope"}}
    return model


REFUSED = {
    **{name: lambda name=name: tiny_model(name) for name in UNPACKABLE},
    "longrope": with_longrope,
    "layers that share keys": lambda: build("gemma3n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_refuse_chunks_read_all_at_once(name):
    model, (context,) = REFUSED[name](), random_ids(41)
    counts = tokens_run(model)
    SharedPrefix.build(model, context, chunk_tokens=5)
    assert counts == [41]


def test_layer_that_bypasses_the_cache_is_an_error(monkeypatch):
    model, (context,) = tiny_model(), random_ids(20)
    monkeypatch.setattr(GrowingLayer, "update", lambda self, k, v, *_, **__: (k, v))
    with pytest.raises(RuntimeError, match="layer 0 did not get its context"):
        SharedPrefix.build(model, context, chunk_tokens=8)


def test_chunk_size_is_a_function_of_the_shapes():
    from transformers import AutoConfig

    def body(dtype, **shape):
        config = AutoConfig.for_model("qwen3", **shape)
        one = torch.nn.Linear(1, 1, bias=False, dtype=dtype)
        one.config = config
        return one

    qwen = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "head_dim": 128}
    smollm = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "head_dim": 64}
    assert chunked_prefill.chunk_tokens(body(torch.bfloat16, **qwen)) == 1792
    assert chunked_prefill.chunk_tokens(body(torch.float32, **smollm)) == 7680
    assert chunked_prefill.chunk_tokens(body(torch.float32, **{**qwen, "intermediate_size": 10**6})) == 256

    class OfLayers(type(body(torch.float32).config)):
        per_layer_config = ()

        def __getattribute__(self, name):
            if name == "head_dim":
                raise RuntimeError("head_dim is an attribute of layers")
            return super().__getattribute__(name)

    of_layers = body(torch.bfloat16, **qwen)
    of_layers.config.__class__ = OfLayers
    assert chunked_prefill.chunk_tokens(of_layers) == 1792  # hidden_size / heads in its place


def test_the_teacher_reads_long_contexts_in_chunks(monkeypatch):
    monkeypatch.setattr(chunked_prefill, "chunk_tokens", lambda body: 16)
    model, (context,) = tiny_model(), random_ids(41)
    counts = tokens_run(model)
    teacher = ContextTeacher(model, context, path="merge")
    assert_same_prefix(teacher.prefixes[0], SharedPrefix.build(tiny_model(), context, chunk_tokens=0))
    assert counts == [16, 16, 9]


def test_planted_error_in_chunks_steps_down(monkeypatch):
    honest = GrowingLayer.prefixes
    monkeypatch.setattr(GrowingLayer, "prefixes", lambda *args: [(k.roll(1, -2), v) for k, v in honest(*args)])
    assert ContextTeacher(tiny_model(), [1, 2]).path != "merge"


def test_peak_memory_does_not_depend_on_the_length():
    model = tiny_model(max_position_embeddings=4096)
    peaks = {}
    for length in (512, 2048):
        (context,) = random_ids(length)
        kv = 2 * 3 * length * 2 * 8 * 4
        for chunk in (64, 0):
            peak = peak_bytes(lambda c=context, k=chunk: SharedPrefix.build(model, c, chunk_tokens=k))
            peaks[length, chunk] = peak - kv
    token_ids = 3 * 8 * 2048  # the ids themselves, and copies of them
    assert peaks[2048, 64] <= peaks[512, 64] + token_ids
    assert peaks[2048, 64] < 64 * 64 * 4 * 16
    assert peaks[2048, 0] > 3 * peaks[512, 0]  # the meter sees what one pass holds

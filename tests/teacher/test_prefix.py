"""A context as the model read it: at once, in chunks, or after a part that others share; the same prefix each time."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from memory_record import peak_bytes
from tiny_models import CONFIGS, UNPACKABLE, plain_hidden, random_ids, tiny_model, tokens_run

from opcd_fast.teacher import ContextTeacher
from opcd_fast.teacher.prefix import SharedPrefix, chunked_prefill, nested

TOLERANCE = 1e-5  # relative to the largest value


def assert_same_prefix(a, b):
    assert torch.equal(a.token_ids, b.token_ids) and a.nbytes == b.nbytes
    pairs = [*zip(a.keys, b.keys, strict=True), *zip(a.values, b.values, strict=True)]
    for x, y in [*pairs, (a.last_hidden_state, b.last_hidden_state)]:
        assert x.shape == y.shape and x.dtype == y.dtype
        assert (x - y).abs().max() <= TOLERANCE * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize(("name", "kept"), [("llama", 20), ("mistral-window-below-context", 7)])
def test_shapes_and_bytes(name, kept):
    model = tiny_model(name)
    (context,) = random_ids(20)
    prefix = SharedPrefix.build(model, context)
    assert len(prefix) == 20 and len(prefix.keys) == len(prefix.values) == 3
    for x in (*prefix.keys, *prefix.values):
        assert x.shape == (1, 2, kept, 8)
        assert x.untyped_storage().nbytes() == x.numel() * 4  # not a view of something longer
        assert not x.requires_grad
    assert prefix.nbytes == 2 * 3 * 2 * kept * 8 * 4
    with torch.no_grad():
        torch.testing.assert_close(prefix.last_hidden_state, plain_hidden(model, context)[-1])
    empty = SharedPrefix.build(model, context[:0])
    assert len(empty) == 0 and empty.nbytes == 0 and empty.last_hidden_state is None


@pytest.mark.parametrize("chunk", [0, 64])
def test_keys_and_values_are_put_where_it_was_asked(chunk):
    prefix = SharedPrefix.build(tiny_model(), random_ids(20)[0], chunk_tokens=chunk, device="meta")
    assert prefix.nbytes_by_device == {"meta": 2 * 3 * 20 * 2 * 8 * 4}


def test_concat_keeps_nothing_to_put():
    with pytest.raises(ValueError, match="prefix_device: path='concat' keeps no keys"):
        ContextTeacher(tiny_model(), [1, 2], path="concat", prefix_device="cpu")
    for place in ("nowhere", 3.5):
        with pytest.raises(ValueError, match="prefix_device: expected 'cpu'"):
            ContextTeacher(tiny_model(), [1, 2], prefix_device=place)
    teacher = ContextTeacher(tiny_model("llama-dynamic-rope"), [1, 2], prefix_device="cpu")
    assert teacher.path == "concat" and "prefix_device: not used" in teacher.explain()


# --- in chunks ---------------------------------------------------------------------------------------------


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


def test_what_cannot_be_extended_is_refused():
    model, (context,) = tiny_model(), random_ids(20)
    with pytest.raises(ValueError, match="chunk_tokens: .* got -1"):
        SharedPrefix.build(model, context, chunk_tokens=-1)
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


@pytest.mark.parametrize("name", [*UNPACKABLE, "phi3-longrope", "gemma3n"])
def test_models_that_refuse_chunks_read_all_at_once(name):
    """The last two: positions that move with the length, and layers that share keys."""
    model, (context,) = tiny_model(name) if name in UNPACKABLE else build(name), random_ids(41)
    counts = tokens_run(model)
    SharedPrefix.build(model, context, chunk_tokens=5)
    assert counts == [41]


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


def test_the_teacher_reads_long_contexts_in_chunks(monkeypatch):
    monkeypatch.setattr(chunked_prefill, "chunk_tokens", lambda body: 16)
    model, (context,) = tiny_model(), random_ids(41)
    counts = tokens_run(model)
    teacher = ContextTeacher(model, context, path="merge")
    assert_same_prefix(teacher.prefixes[0], SharedPrefix.build(tiny_model(), context, chunk_tokens=0))
    assert counts == [16, 16, 9]


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


# --- contexts that begin alike ------------------------------------------------------------------------------


@pytest.fixture
def least_10(monkeypatch):
    monkeypatch.setattr(nested, "LEAST_TOKENS", 10)


def family():
    """Contexts 0, 2, 4 share 30 tokens, 2 and 4 share 45; 1 stands alone; 3 is the end of a chain; 5 repeats 0."""
    system, notes, a, b, c, other = random_ids(30, 15, 12, 9, 14, 20)
    parts = (system, a), (other,), (system, notes, b), (system, notes, b, c), (system, notes, c), (system, a)
    return [torch.cat(part) for part in parts]


def test_beginnings_are_found():
    def lengths(contexts, least):
        return [[b.length for b in beginnings] for beginnings in nested.shared_beginnings(contexts, least)]

    assert lengths(family(), 10) == [[30, 42], [], [30, 45], [30, 45], [30, 45], [30, 42]]
    assert lengths(family(), 31) == [[42], [], [45], [45], [45], [42]]
    assert lengths([], 10) == [] and lengths([torch.zeros(0, dtype=torch.int64)] * 2, 10) == [[], []]
    found = nested.shared_beginnings(family(), 10)
    assert found[0][0].members == {0, 2, 3, 4, 5} and found[2][1].members == {2, 3, 4} and found[5][1].members == {0, 5}


def test_beginnings_of_random_families_are_shared_and_long_enough():
    """Against the definition, on contexts over two tokens, so that many begin alike."""
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        contexts = [
            torch.randint(0, 2, (int(torch.randint(0, 12, (1,), generator=g)),), generator=g)
            for _ in range(int(torch.randint(1, 9, (1,), generator=g)))
        ]
        for least in (1, 3):
            found = nested.shared_beginnings(contexts, least)
            for index, beginnings in enumerate(found):
                lengths = [0, *(b.length for b in beginnings)]
                assert all(b - a >= least for a, b in zip(lengths, lengths[1:], strict=False))
                for beginning in beginnings:
                    ids = contexts[index][: beginning.length]
                    begins = {i for i, c in enumerate(contexts) if torch.equal(c[: beginning.length], ids)}
                    assert len(ids) == beginning.length and index in beginning.members and len(beginning.members) > 1
                    assert beginning.members <= begins
                    # One object for all its members, so that it is read once.
                    assert all(beginning in found[i] for i in beginning.members)
                    if least == 1:
                        assert beginning.members == begins


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_contexts_read_apart(name, least_10):
    model, contexts = tiny_model(name), family()
    counts = tokens_run(model)
    teacher = ContextTeacher(model, contexts, path="merge")
    prefixes = teacher.prefixes
    # 30 shared by five, 15 by three; b is the end of 2 and lies inside 3; 5 repeats 0. Context 2 is 9 longer than 45,
    # less than what counts as a beginning of 3.
    assert sum(counts) == 30 + 15 + 12 + 9 + (9 + 14) + 14 + 20
    assert sum(counts) < sum(len(context) for context in contexts) / 2
    plain = tiny_model(name)
    for prefix, context in zip(prefixes, contexts, strict=True):
        assert_same_prefix(prefix, SharedPrefix.build(plain, context, chunk_tokens=0))
    assert prefixes[5] is prefixes[0]
    # What was shared is gone: all who need it are in memory.
    assert teacher._prefixes.nbytes == sum(prefix.nbytes for prefix in prefixes[:5])
    counts.clear()
    assert all(a is b for a, b in zip(teacher.prefixes, prefixes, strict=True)) and not counts

"""Keys and values in eight bits: the error they bring, in them and in what the teacher says."""

from __future__ import annotations

import pytest
import torch
from tiny_models import pack, plain_after_context, random_ids, tiny_model

from opcd_fast.prefix import SharedPrefix
from opcd_fast.prefix_store import PrefixStore, identity_of
from opcd_fast.stored_layer import StoredLayer, storage_type
from opcd_fast.teacher import ContextTeacher

FP8 = torch.float8_e4m3fn
HALF_STEP = 2.0**-4  # of a normal number with three bits of mantissa


def keys_and_values(dtype=torch.float32, heads=2, kept=33, width=(8, 6)):
    """Channels of keys and heads of values lie orders of magnitude apart, as those of models do."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, heads, kept, width[0], generator=g) * torch.logspace(-3, 3, width[0])
    values = torch.randn(1, heads, kept, width[1], generator=g) * torch.logspace(-2, 2, heads).view(1, -1, 1, 1)
    return keys.to(dtype), values.to(dtype)


def relative_rms(got, exact):
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_that_of_the_format(dtype):
    keys, values = keys_and_values(dtype)
    layer = StoredLayer(keys, values).quantise(FP8)
    assert layer.keys.dtype == layer.values.dtype == FP8
    assert layer.key_scale.shape == (1, 2, 1, 8) and layer.value_scale.shape == (1, 2, 1, 1)
    assert layer.key_scale.dtype == layer.value_scale.dtype == torch.float32
    slack = 1 + 2 * torch.finfo(dtype).eps / HALF_STEP
    for got, exact, shared in zip(layer.dequantised(dtype), (keys, values), ((-2,), (-2, -1)), strict=True):
        assert got.dtype == dtype and got.shape == exact.shape
        error, largest = (got.double() - exact.double()).abs(), exact.double().abs().amax(shared, keepdim=True)
        # Below 2^-15 of the largest number numbers are subnormal: their steps are the same, 2^-18 of it or less.
        bound = torch.maximum(exact.double().abs() * HALF_STEP, largest * 2.0**-18)
        assert bool((error <= bound * slack).all())
        # In the mean of each channel, so that one scale for everything would not do: small channels would be zeros.
        assert max(relative_rms(got[..., c], exact[..., c]) for c in range(got.shape[-1])) < 0.04
        assert 0.015 < relative_rms(got, exact) < 0.035  # not the identity, nor worse than the format


def test_zeros_and_extremes():
    keys = torch.zeros(1, 1, 4, 3)
    keys[..., 1] = torch.tensor([1e30, -1e30, 5e29, 1e-30])
    keys[..., 2] = 1e-30
    layer = StoredLayer(keys, torch.zeros(1, 1, 4, 2)).quantise(FP8)
    got, values = layer.dequantised(torch.float32)
    assert torch.isfinite(got).all() and not values.any() and not got[..., 0].any()
    torch.testing.assert_close(got[..., 2], keys[..., 2], rtol=HALF_STEP, atol=0)
    torch.testing.assert_close(got[..., 1], keys[..., 1], rtol=HALF_STEP, atol=1e25)


def test_twice_is_once_and_plain_is_itself():
    keys, values = keys_and_values()
    plain = StoredLayer(keys, values)
    assert plain.dequantised(torch.float32) == (keys, values)  # the tensors themselves: no copy
    layer = plain.quantise(FP8)
    assert layer.quantise(FP8) is layer


@pytest.mark.parametrize("name", ["float8_e5m2", "int8", torch.float16, 8, ""])
def test_other_types_are_refused(name):
    with pytest.raises(ValueError, match="prefix_dtype: expected None or 'float8_e4m3fn'"):
        storage_type(name)
    with pytest.raises(ValueError, match="prefix_dtype"):
        ContextTeacher(tiny_model(), [1, 2], prefix_dtype=name)


# --- prefixes and teachers ----------------------------------------------------------------------------------

NAMES = ["llama", "qwen3", "mistral-window-below-context", "gemma2"]  # the last one on pad


def kl_to(exact, hidden, head):
    p, q = ((h.double() @ head.double().T).log_softmax(-1) for h in (exact, hidden))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", NAMES)
def test_kl_of_a_teacher_in_eight_bits(name):
    model = tiny_model(name)
    contexts, sequences, index = random_ids(60, 21), random_ids(12, 7, 15, seed=2), [0, 1, 0]
    ids, bounds = pack(sequences)
    exact = torch.cat([plain_after_context(model, contexts[i], s) for i, s in zip(index, sequences, strict=True)])
    none = torch.cat([plain_after_context(model, contexts[i][:0], s) for i, s in zip(index, sequences, strict=True)])
    teacher = ContextTeacher(model, contexts, prefix_dtype="float8_e4m3fn")
    got = teacher.hidden_states_packed(ids, bounds, context_index=index)
    head = teacher.head.weight.detach()
    error, matters = kl_to(exact, got, head), kl_to(exact, none, head)
    assert relative_rms(got, exact) > 1e-4  # it is in effect
    assert error < 0.05 * matters, (error, matters)
    assert "kept as float8_e4m3fn" in teacher.explain() and "2^-4" in teacher.explain()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_eight_bits_and_scales(dtype):
    model, (context,) = tiny_model().to(dtype), random_ids(50)
    plain = ContextTeacher(model, context, path="merge").prefixes[0]
    prefix = ContextTeacher(model, context, path="merge", prefix_dtype="float8_e4m3fn").prefixes[0]
    scales = 3 * 2 * (8 + 1) * 4  # layers, H_kv, channels of keys and one of values, fp32
    assert prefix.quantised and prefix.nbytes == 3 * 2 * 50 * 2 * 8 + scales
    assert plain.nbytes == 3 * 2 * 50 * 2 * 8 * dtype.itemsize
    assert prefix.nbytes_by_device == {"cpu": prefix.nbytes}
    for got, exact in zip((*prefix.keys, *prefix.values), (*plain.keys, *plain.values), strict=True):
        assert got.dtype == FP8 and got.shape == exact.shape and got.untyped_storage().nbytes() == got.numel()
    assert torch.equal(prefix.last_hidden_state, plain.last_hidden_state)


def test_recurrent_states_stay_in_their_type():
    from architectures import build

    model, (context,) = build("falcon-h1"), random_ids(20)
    teacher = ContextTeacher(model, context, path="pad", prefix_dtype="float8_e4m3fn")
    prefix, plain = teacher.prefixes[0], ContextTeacher(model, context, path="pad").prefixes[0]
    assert prefix.quantised and len(prefix.states) == len(plain.states) > 0
    for got, exact in zip(prefix.states, plain.states, strict=True):
        assert got.keys() == exact.keys() and all(torch.equal(got[n], exact[n]) for n in exact)
    (sequence,) = random_ids(6, seed=2)
    got = teacher.hidden_states(sequence.unsqueeze(0))[0]
    assert relative_rms(got, plain_after_context(model, context, sequence)) < 0.2


def test_file_keeps_the_eight_bits(tmp_path):
    model, (context,) = tiny_model("qwen2-mixed-window"), random_ids(20)
    prefix = SharedPrefix.build(model, context).stored(dtype="float8_e4m3fn")
    prefix.save(tmp_path / "context.safetensors")
    loaded = SharedPrefix.load(tmp_path / "context.safetensors", model=model)
    assert loaded.quantised and loaded.tensors().keys() == prefix.tensors().keys()
    for name, x in prefix.tensors().items():
        assert x.dtype == loaded.tensors()[name].dtype and torch.equal(x, loaded.tensors()[name])
    assert (tmp_path / "context.safetensors").stat().st_size < 0.6 * 4 * 2 * (20 + 7 + 7) * 2 * 8 + 4096


def test_store_tells_the_types_apart(tmp_path):
    model, (context,) = tiny_model(), random_ids(20)
    assert identity_of(model, "w") != identity_of(model, "w", FP8)
    assert "stored" not in identity_of(model, "w")  # files of earlier versions are found
    options = {"path": "merge", "store": tmp_path}
    for dtype in (None, "float8_e4m3fn"):
        ContextTeacher(model, context, prefix_dtype=dtype, **options).prefixes  # noqa: B018
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    again = ContextTeacher(model, context, prefix_dtype="float8_e4m3fn", **options)
    assert again.prefixes[0].quantised and "from the store: 1" in again.explain()
    assert not ContextTeacher(model, context, **options).prefixes[0].quantised
    # A file that was exchanged is refused, whatever it holds.
    small, large = sorted(tmp_path.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    small.write_bytes(large.read_bytes())
    assert PrefixStore(tmp_path).read(identity_of(model, "w", FP8), context, model) is None


def test_contexts_are_not_built_on_rounded_ones(monkeypatch):
    monkeypatch.setattr("opcd_fast.nested_contexts.LEAST_TOKENS", 10)
    system, a, b = random_ids(20, 10, 12)
    contexts = [system, torch.cat([system, a]), torch.cat([system, b])]
    model = tiny_model()
    together = ContextTeacher(model, contexts, path="merge", prefix_dtype="float8_e4m3fn")
    for index in range(3):  # one by one, so that the beginning is in memory, in eight bits, when the others come
        together.hidden_states_packed(torch.tensor([5]), torch.tensor([0, 1]), context_index=[index])
    for prefix, context in zip(together.prefixes, contexts, strict=True):
        alone = SharedPrefix.build(model, context).stored(dtype="float8_e4m3fn")
        for layer in range(3):
            for got, want in zip(
                prefix.layer(layer).dequantised(torch.float32), alone.layer(layer).dequantised(torch.float32)
            ):
                # A number next to the middle of a step may go either way; few do.
                assert ((got - want).abs() > 1e-4).float().mean() < 0.01
    with pytest.raises(ValueError, match="after: it is in eight bits"):
        SharedPrefix.build(model, contexts[1], after=together.prefixes[0])


def test_concat_refuses_and_says_so(caplog):
    for option in ({"prefix_dtype": "float8_e4m3fn"}, {"prefix_device": "cpu"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: path='concat' keeps no keys"):
            ContextTeacher(tiny_model(), [1, 2], path="concat", **option)
        teacher = ContextTeacher(tiny_model("llama-dynamic-rope"), [1, 2], **option)
        assert teacher.path == "concat" and f"{next(iter(option))}: not used" in teacher.explain()

"""Keys and values of prefixes as a cache: who gets which, what is kept of them, and copies from the host."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from tiny_models import assert_close, pack, random_ids, reference, tiny_model

from opcd_fast.models.caches import GrowingLayer, prefix_cache
from opcd_fast.teacher import ContextTeacher

CPU = torch.device("cpu")


class Attention(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer_idx = layer


def stored(layers, prefixes=2, empty=()):
    """layers[layer][prefix]; `empty` layers have no keys of their own."""
    g = torch.Generator().manual_seed(0)

    def one(layer, n):
        shape = (1, 0, 0, 0) if layer in empty else (1, 2, n, 4)
        return torch.randn(shape, generator=g), torch.randn(shape, generator=g)

    return [[one(layer, 5 + n) for n in range(prefixes)] for layer in range(layers)]


def same(found, held):
    return all(map(torch.equal, (x for pair in found for x in pair), (x for pair in held for x in pair)))


# --- which layer reads what -----------------------------------------------------------------------------------


def test_a_layer_that_reads_anothers_keys_gets_that_ones_prefix():
    layers = stored(4, empty=(2, 3))
    cache = prefix_cache(layers)
    keys = [torch.zeros(1, 2, 7, 4) for _ in range(2)]  # the same numbers: the tensor tells whose they are
    for layer, key in enumerate(keys):
        assert cache.update(key, key, layer)[0] is key
    for layer in (2, 3, 9):
        for lender in (0, 1):
            assert same(cache.prefixes(Attention(layer), keys[lender]), layers[lender])
    for other in (keys[1].clone(), keys[1][:], torch.zeros(1)):
        with pytest.raises(RuntimeError, match="layer 1 did not get its context"):
            cache.prefixes(Attention(1), other)
    assert cache.get_seq_length() == 5 + 6


def test_compressed_keys_are_expanded_by_their_layer():
    """As DeepSeek-V3 does: it makes new keys of what the cache gave back."""
    layers = stored(2)
    cache = prefix_cache(layers)
    attention = Attention(1)
    attention.expand_kv = lambda latent, rotated: (latent * 2, rotated * 3)
    with pytest.raises(RuntimeError, match="layer 1 did not get its context"):
        cache.prefixes(attention, torch.zeros(1))
    latent = torch.zeros(1, 2, 7, 4)
    cache.update(latent, latent, 1)
    got = cache.prefixes(attention, torch.zeros(1, 2, 7, 9))
    assert same(got, [(keys * 2, values * 3) for keys, values in layers[1]])
    del latent  # the layer is over
    with pytest.raises(RuntimeError, match="layer 1 did not get its context"):
        cache.prefixes(attention, torch.zeros(1))


# --- a context that grows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "kept"), [(None, 6), (4, 3), (40, 6), (1, 0)])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_chunk_reads_what_came_before_it(window, kept, chunk):
    x = torch.arange(40.0).view(1, 2, 20, 1)
    layer = GrowingLayer(6 + 2 * chunk, window, (x[..., 6 - kept : 6, :], -x[..., 6 - kept : 6, :]), 6)
    for first in (6, 6 + chunk):
        seen = first if window is None else min(first, window - 1)
        assert layer.get_seq_length() == first and layer.get_mask_sizes(3) == (seen + 3, first - seen)
        key = x[..., first : first + chunk, :]
        got = layer.update(key, -key)
        assert got[0] is key and layer.given() is key
        before = x[..., first - seen : first, :]
        assert same(layer.prefixes(CPU), [(before, -before)])
    end = 6 + 2 * chunk
    left = x[..., end - (end if window is None else min(end, window - 1)) : end, :]
    assert torch.equal(layer.keys, left) and torch.equal(layer.values, -left)
    assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4


@pytest.mark.parametrize("window", [None, 4])
def test_it_grows_on_the_device_that_keeps_it_in_the_values_type(window):
    layer = GrowingLayer(6, window, place=torch.device("meta"))
    layer.update(torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, 6, 4, dtype=torch.bfloat16))
    assert {(x.device.type, x.dtype) for x in (layer.keys, layer.values)} == {("meta", torch.bfloat16)}


# --- from elsewhere -------------------------------------------------------------------------------------------


MODELS = {
    "llama": tiny_model,
    "windows": lambda: tiny_model("qwen2-mixed-window"),
    "gemma2": lambda: tiny_model("gemma2"),  # a softcap
    "gemma3n": lambda: build("gemma3n"),  # layers that read the keys of others
    "gemma4": lambda: build("gemma4-shared-kv"),
    "falcon-h1": lambda: build("falcon-h1"),  # recurrent states, on pad
    "zamba2": lambda: build("zamba2"),
}
ON_PAD = ("falcon-h1", "zamba2")


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_as_on_the_device(name):
    model = MODELS[name]()
    contexts, sequences, index = random_ids(20, 6, 0), random_ids(5, 1, 7, 4, 9, seed=2), [1, 0, 2, 0, 1]
    teacher = ContextTeacher(model, contexts, prefix_device="cpu")
    assert teacher.path == ("pad" if name in ON_PAD else "merge")
    got = teacher.hidden_states_packed(*pack(sequences), context_index=index)
    assert_close(got, reference(model, contexts, sequences, index))
    assert "kept on cpu" in teacher.explain() and "MiB on cpu" in teacher.explain()


def test_keys_come_to_the_device_that_asks_and_are_not_copied_at_home():
    (held,) = stored(1)
    (layer,) = prefix_cache([held]).layers
    assert all(x is y for got, pair in zip(layer.prefixes(CPU), held) for x, y in zip(got, pair))
    assert {x.device.type for pair in layer.prefixes(torch.device("meta")) for x in pair} == {"meta"}

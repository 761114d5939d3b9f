"""Keys and values of prefixes as a cache: who gets which, what is kept of them, and copies from the host."""

from __future__ import annotations

import pytest
import torch
from late_copies import LateCopies

from opcd_fast.models.caches import GrowingLayer, prefix_cache, stream
from opcd_fast.models.caches.stream import PrefixStream

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


# --- which layer reads what ---------------------------------------------------------------------------------


def test_keys_come_back_as_they_are_and_a_layer_gets_its_prefix():
    layers = stored(3)
    cache = prefix_cache(layers)
    for layer in range(3):
        key, value = torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4)
        got = cache.update(key, value, layer)
        assert got[0] is key and got[1] is value
        found = cache.prefixes(Attention(layer), key)
        assert [list(map(id, pair)) for pair in found] == [list(map(id, pair)) for pair in layers[layer]]  # no copies
    assert cache.get_seq_length() == 5 + 6


def test_a_layer_that_reads_anothers_keys_gets_that_ones_prefix():
    layers = stored(4, empty=(2, 3))
    cache = prefix_cache(layers)
    keys = [torch.zeros(1, 2, 7, 4) for _ in range(2)]  # the same numbers: the tensor tells whose they are
    for layer, key in enumerate(keys):
        cache.update(key, key, layer)
    for layer in (2, 3, 9):
        for lender in (0, 1):
            assert same(cache.prefixes(Attention(layer), keys[lender]), layers[lender])


def test_keys_that_did_not_pass_the_cache_are_an_error():
    cache = prefix_cache(stored(2))
    key = torch.zeros(1, 2, 7, 4)
    cache.update(key, key, 0)
    for other in (key.clone(), key[:], torch.zeros(1)):
        with pytest.raises(RuntimeError, match="layer 1 did not get its context"):
            cache.prefixes(Attention(1), other)


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


# --- a context that grows -----------------------------------------------------------------------------------


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
        assert got[0] is key and layer.given is key
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


# --- from the host ------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(monkeypatch):
    """A function that opens a stream of layers, as if they were on the host."""
    monkeypatch.setattr(stream, "SideStream", LateCopies)

    def open_stream(layers):
        opened = PrefixStream(layers)
        monkeypatch.setattr(opened, "layer", lambda index: opened._streamed(index, CPU))
        return opened

    return open_stream


@pytest.mark.parametrize("empty", [(), (1, 4)])
def test_the_next_layer_is_on_its_way_before_this_one_is_used(empty, streamed):
    layers = stored(5, empty=empty)
    opened, full = streamed(layers), [i for i in range(5) if i not in empty]
    for index in full:
        assert same(opened.layer(index), layers[index])
    nbytes = opened._side.log[0]
    assert sum(x.nbytes for pair in layers[0] for x in pair) <= nbytes <= 4 * 256  # one layer, aligned
    assert opened._side.log == [nbytes, nbytes, "copy", *["join", "copy"] * (len(full) - 1), "join"]


def test_any_order_is_right_and_lenders_stay(streamed):
    layers = stored(4)
    opened = streamed(layers)
    for index in (2, 0, 0, 3, 1, 2):
        assert same(opened.layer(index), layers[index])
    opened = streamed(layers)
    for index in (0, 1, 2, 3, 2, 3, 3, 2):  # two lenders at the end, as in Gemma-3n
        assert same(opened.layer(index), layers[index])
    assert opened._side.log.count("copy") == 4


def test_elsewhere_it_is_a_plain_copy():
    ((key, value), _) = PrefixStream(stored(2)).layer(1, torch.device("meta"))
    assert key.device.type == value.device.type == "meta"

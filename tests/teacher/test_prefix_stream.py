"""Prefixes are read where they lie, and may lie elsewhere than the model.

There is one device here, so copies are put in that take place inside of it.
"""

from __future__ import annotations

import pytest
import torch
from architectures import build
from late_copies import LateCopies
from memory_record import peak_bytes
from tiny_models import pack, plain_after_context, random_ids, tiny_model
from transformers import AutoModelForCausalLM, MistralConfig

from opcd_fast.models import seam
from opcd_fast.models.caches import stream
from opcd_fast.models.caches.stream import PrefixStream
from opcd_fast.teacher import ContextTeacher, SharedPrefix


@pytest.fixture
def from_the_host(monkeypatch):
    """Every stream that was opened; all prefixes count as lying on the host."""
    monkeypatch.setattr(LateCopies, "opened", [])
    monkeypatch.setattr(stream, "SideStream", LateCopies)
    monkeypatch.setattr(PrefixStream, "layer", PrefixStream._streamed)
    return LateCopies.opened


MODELS = {
    "llama": tiny_model,
    "windows": lambda: tiny_model("qwen2-mixed-window"),
    "gemma2-on-pad": lambda: tiny_model("gemma2"),
    "gemma3n": lambda: build("gemma3n"),  # layers that read the keys of others
    "gemma4": lambda: build("gemma4-shared-kv"),
    "falcon-h1": lambda: build("falcon-h1"),  # recurrent states, on pad
    "zamba2": lambda: build("zamba2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_as_on_the_device(name, request):
    model = MODELS[name]()
    contexts, sequences, index = random_ids(20, 6, 0), random_ids(5, 1, 7, 4, 9, seed=2), [1, 0, 2, 0, 1]
    ids, bounds = pack(sequences)
    resident = ContextTeacher(model, contexts)
    want = resident.hidden_states_packed(ids, bounds, context_index=index)

    opened = request.getfixturevalue("from_the_host")
    teacher = ContextTeacher(model, contexts, prefix_device="cpu")
    assert teacher.path == resident.path and opened  # the check goes that way, too
    opened.clear()
    got = teacher.hidden_states_packed(ids, bounds, context_index=index)
    assert torch.equal(got, want)
    full = sum(x.numel() > 0 for x in teacher.prefixes[0].keys)
    # pad runs context by context; one is empty
    assert [one.log.count("copy") for one in opened] == [full] * (1 if teacher.path == "merge" else 2)
    exact = torch.cat([plain_after_context(model, contexts[i], s) for i, s in zip(index, sequences, strict=True)])
    torch.testing.assert_close(got, exact, atol=1e-4, rtol=0)
    assert "kept on cpu" in teacher.explain() and "MiB on cpu" in teacher.explain()


def test_a_copy_that_is_not_waited_for_is_caught_by_the_check(from_the_host, monkeypatch):
    monkeypatch.setattr(LateCopies, "join", lambda self: None)
    with pytest.raises(ValueError, match="path='merge': it failed its check.*use path='auto'"):
        _ = ContextTeacher(tiny_model(), [1, 2], path="merge", prefix_device="cpu").path
    assert ContextTeacher(tiny_model(), [1, 2], prefix_device="cpu").path == "concat"


@pytest.mark.parametrize("chunk", [0, 64])
def test_keys_and_values_are_put_where_it_was_asked(chunk):
    prefix = SharedPrefix.build(tiny_model(), random_ids(20)[0], chunk_tokens=chunk, device="meta")
    assert prefix.nbytes_by_device == {"meta": 2 * 3 * 20 * 2 * 8 * 4}


def test_concat_keeps_nothing_to_put():
    with pytest.raises(ValueError, match="prefix_device: path='concat' keeps no keys"):
        ContextTeacher(tiny_model(), [1, 2], path="concat", prefix_device="cpu")
    teacher = ContextTeacher(tiny_model("llama-dynamic-rope"), [1, 2], prefix_device="cpu")
    assert teacher.path == "concat" and "prefix_device: not used" in teacher.explain()


def test_bad_places():
    for place in ("nowhere", 3.5):
        with pytest.raises(ValueError, match="prefix_device: expected 'cpu'"):
            ContextTeacher(tiny_model(), [1, 2], prefix_device=place)


# --- read where it lies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 64])
def test_the_peak_does_not_grow_with_the_context(window):
    """Joined with the row, one layer's keys and values of 1,536 tokens more would be 1.5 MiB."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, sliding_window=window,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, bounds = pack(random_ids(*[8] * 6))
    peaks = []
    for length in (512, 2048):
        teacher = ContextTeacher(model, random_ids(length)[0], path="merge")
        teacher.hidden_states_packed(ids, bounds)
        peaks.append(peak_bytes(lambda: teacher.hidden_states_packed(ids, bounds)))  # noqa: B023
    layer = (2048 - 512) * 2 * 2 * 64 * 4
    assert peaks[1] - peaks[0] < layer / 50


def test_a_cache_that_is_dropped_on_the_way_is_an_error(monkeypatch):
    teacher = ContextTeacher(tiny_model(), random_ids(20)[0], path="merge")
    ids, bounds = pack(random_ids(5, 3))
    teacher.hidden_states_packed(ids, bounds)
    honest = seam.run_body
    monkeypatch.setattr(seam, "run_body", lambda *args, cache=None, **options: honest(*args, **options))
    with pytest.raises(RuntimeError, match="layer 0 did not get its context"):
        teacher.hidden_states_packed(ids, bounds)

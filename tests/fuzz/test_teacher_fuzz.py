"""Random ragged batches after random contexts: every path gives what a plain forward of each sequence gives."""

import functools
from contextlib import nullcontext

import pytest
import torch
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CONFIGS, pack, random_ids, reference, tiny_model, with_lora

from opcd_fast.teacher import ContextTeacher

MODELS = [name for name in CONFIGS if name != "llama-mha"]
LIMIT = 128  # max_position_embeddings
PATHS = ("auto", "merge", "pad", "concat")


@functools.cache
def model_of(name: str, window: int | None, adapter: bool):
    plain = tiny_model(name, **({} if window is None else {"sliding_window": window}))
    return with_lora(plain) if adapter else plain


@st.composite
def calls(draw):
    name = draw(st.sampled_from(MODELS))
    window = draw(st.sampled_from([None, 2, 3, 17])) if "window" in name and "no-" not in name else None
    contexts = draw(st.lists(st.sampled_from([0, 1, 2, 7, 16, 17, 40]), min_size=1, max_size=3))
    lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 5, 16, 33]), min_size=1, max_size=5))
    index = draw(st.lists(st.integers(0, len(contexts) - 1), min_size=len(lengths), max_size=len(lengths)))
    selected = draw(st.none() | st.lists(st.integers(0, max(0, sum(lengths) - 1)), max_size=4))
    options = {"path": draw(st.sampled_from(PATHS)), "adapter": draw(st.sampled_from(["disabled", "active"]))}
    for bound in ("max_prefix_bytes", "max_batch_bytes"):
        options[bound] = draw(st.sampled_from([None, 1, 20_000]))
    return name, window, draw(st.booleans()), contexts, lengths, index, selected, draw(st.integers(0, 999)), options


@examples(60)
@given(calls())
def test_every_path_gives_the_same(call):
    name, window, with_adapter, context_lengths, lengths, index, selected, seed, options = call
    model = model_of(name, window, with_adapter)
    contexts, sequences = random_ids(*context_lengths, seed=seed), random_ids(*lengths, seed=seed + 1)
    ids, bounds = pack(sequences)
    select = None if selected is None else torch.tensor(selected, dtype=torch.int64)
    teacher = ContextTeacher(model, contexts, **options)
    if not len(ids):
        with pytest.raises(ValueError, match="input_ids: no tokens"):
            teacher.hidden_states_packed(ids, bounds, context_index=index)
        return
    said = [(x, i) for x, i in zip(sequences, index) if len(x)]
    without = with_adapter and options["adapter"] == "disabled"
    with model.disable_adapter() if without else nullcontext():
        wanted = reference(model, contexts, *zip(*said))
    wanted = wanted if select is None else wanted[select]
    for _ in range(2):  # prefixes are read, and read again or kept
        got = teacher.hidden_states_packed(ids, bounds, context_index=index, select=select)
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0, msg=lambda text: f"{text} in {call}")


@examples(20)
@given(st.integers(0, LIMIT), st.integers(1, 40), st.sampled_from(PATHS))
def test_what_is_too_long_is_told(context, length, path):
    model, contexts, sequences = model_of("llama", None, False), random_ids(context), random_ids(length, seed=2)
    ids, bounds = pack(sequences)
    if context + length <= LIMIT:
        assert ContextTeacher(model, contexts, path=path).hidden_states_packed(ids, bounds).shape == (length, 48)
        return
    with pytest.raises(ValueError, match="contexts|input_ids"):
        ContextTeacher(model, contexts, path=path).hidden_states_packed(ids, bounds)

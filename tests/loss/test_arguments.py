"""What cannot be meant is refused with the argument's name, before anything is computed."""

import math

import pytest
import torch
from loss_oracle import problem

from opcd_fast.loss import (
    LMHead,
    fused_linear_divergence,
    fused_linear_logprobs,
    fused_linear_reverse_kl,
    reverse_kl,
    sequence_mean_weights,
)  # fmt: skip

HEAD, H, _, H_T = problem(rows=3, width=4, vocabulary=7)
W = HEAD.weight
INF, NAN = math.inf, math.nan
FLOAT8 = torch.float8_e4m3fn


def divergence(**given):
    sides = {"student_hidden": H, "student_head": W, "teacher_hidden": H_T, "teacher_head": W}
    return fused_linear_divergence(*(given.pop(name, default) for name, default in sides.items()), **given)


def logprobs(**given):
    sides = {"hidden": H, "head": W, "token_ids": torch.tensor([1, 2, -100])}
    return fused_linear_logprobs(*(given.pop(name, default) for name, default in sides.items()), **given)


def from_logits(**given):
    sides = {"student_logits": H, "teacher_logits": H_T}
    return reverse_kl(*(given.pop(name, default) for name, default in sides.items()), **given)


DENOMINATORS = [0, -1, NAN, INF, "2", [], True, *map(torch.tensor, (0.0, -2.0, NAN, INF, 2j)), torch.ones(2)]
REFUSED = {
    divergence: {
        "backend": [None, 3, [], "cuda"], "workspace_bytes": [INF, NAN, "1", 0, -1, True, 2.0**63],
        "projection": [None, [], "x"], "temperature": [None, "1", [], NAN, INF, 0, torch.tensor(1.0)],
        "divergence": [None, [], 3, "kl"],
        "beta": [None, "x", NAN, [], 2, 1e-13, torch.tensor(0.5)], "alpha": [None, "x", NAN, 1, 1e-13, -0.1],
        "k": [0, 2.5, True, None], "tail": [None, [], "x"], "gate": [None, [], "x"], "reduction": [None, [], "x"],
        "denominator": [*DENOMINATORS, torch.ones((), requires_grad=True)],
        "token_weights": [[1, 1, 1], torch.ones(2), torch.ones(3, requires_grad=True)],
        "token_ids": [[1, 1, 1], torch.ones(3), torch.ones(3, dtype=torch.complex64), torch.ones(2, dtype=torch.int64)],
        "student_hidden": [None, [[1.0]], H.long(), H.to(FLOAT8), H[:, :3], H[:2], H.to_sparse(), torch.tensor(1.0)],
        "teacher_hidden": [None, H_T.to(FLOAT8), H_T[:, :3], H_T[None]], "student_head": [None, [1.0]],
        "teacher_head": [None, LMHead(W[:6])],
    },
    logprobs: {
        "backend": [None, "cuda"], "workspace_bytes": [INF, "1"], "temperature": [None, 0],
        "token_ids": [[1, 2, 3], torch.tensor([1, 2, 7]), torch.ones(3)], "hidden": [None, H.to(FLOAT8)],
        "head": [None, 3],
    },
    from_logits: {
        "student_logits": [None, [1.0], H.to(FLOAT8), H.long(), H[:, :0]], "teacher_logits": [None, H_T.to(FLOAT8)],
        "temperature": [None, -1], "denominator": DENOMINATORS, "reduction": [None], "token_weights": [[1, 1, 1]],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "name"), [(function, name) for function, names in REFUSED.items() for name in names],
    ids=lambda x: getattr(x, "__name__", x),
)  # fmt: skip
def test_of_a_loss(function, name):
    for value in REFUSED[function][name]:
        with pytest.raises((ValueError, TypeError), match=name):
            function(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "weight": [None, [1.0], W.long(), W.to(FLOAT8), W[0], W[:, :0], W[:0]],
        "bias": [[0.0] * 7, torch.ones(6), torch.ones(7).long(), torch.ones(7).to(FLOAT8)],
        "vocab_size": [2.5, True, "7", 0, 8, -1], "scale": ["1", None, NAN, INF, torch.tensor(1.0)],
        "softcap": ["1", 0, -1, NAN, INF, torch.tensor(1.0)], "group": [3],
    }.items(),
)  # fmt: skip
def test_of_a_head(name, values):
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"LMHead: {name}"):
            LMHead(**{"weight": W, name: value})


def test_of_sequence_weights():
    for given, name in (
        ({"mask": [1]}, "mask"), ({"mask": torch.ones(3)}, "mask"), ({}, "mask and cu_seqlens"),
        ({"cu_seqlens": [0, 1]}, "cu_seqlens"), ({"cu_seqlens": torch.arange(0)}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, "cu_seqlens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            sequence_mean_weights(**given)


def test_an_empty_batch_may_have_any_denominator():
    """Of a micro-batch without a token, whose sum over ranks is not known here, nothing is divided."""
    assert float(divergence(denominator=torch.tensor(0.0), token_weights=torch.zeros(3))) == 0


def second_order():
    """Each public loss as a function of a leaf."""
    ids = torch.tensor([1, 2, 3])
    return {
        "fused_linear_divergence": lambda x: fused_linear_divergence(x, W, H_T, W, divergence="jsd"),
        "fused_linear_reverse_kl": lambda x: fused_linear_reverse_kl(x, W, H_T, W),
        "of the head": lambda x: fused_linear_reverse_kl(H, x, H_T, W),
        "none": lambda x: fused_linear_reverse_kl(x, W, H_T, W, reduction="none").square().sum(),
        "reverse_kl": lambda x: reverse_kl(x @ W.T, H_T @ W.T),
        "reverse_kl, none": lambda x: reverse_kl(x @ W.T, H_T @ W.T, reduction="none").sum(),
        "fused_linear_logprobs": lambda x: fused_linear_logprobs(x, W, ids).sum(),
    }


@pytest.mark.parametrize("name", second_order())
def test_second_derivatives_are_refused(name):
    """Dropped without a word, a gradient penalty would train on nothing."""
    x = (W if name == "of the head" else H).clone().requires_grad_()
    loss = second_order()[name](x)
    with pytest.raises(RuntimeError, match="create_graph=True: .* second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        second_order()[name](x).backward(create_graph=True)
    (gradient,) = torch.autograd.grad(second_order()[name](x), x)
    assert gradient.any() and not gradient.requires_grad

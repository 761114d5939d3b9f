"""fused_linear_logprobs against float64 autograd."""

import pytest
import torch
from loss_oracle import logits64, relative_error, states

from opcd_fast.loss import LMHead, fused_linear_logprobs

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def check(h, head, ids, backend, upstream=None, temperature=1.0, tolerance=1e-4, **options):
    leaves = [h.clone().requires_grad_(), head.weight.clone().requires_grad_()]
    leaves += [] if head.bias is None else [head.bias.clone().requires_grad_()]
    ours = fused_linear_logprobs(
        leaves[0], LMHead(leaves[1], leaves[2] if len(leaves) > 2 else None, head.scale, head.softcap, head.vocab_size),
        ids, temperature=temperature, backend=backend, **options,
    )  # fmt: skip
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    twin = LMHead(twins[1], twins[2] if len(twins) > 2 else None, head.scale, head.softcap, head.vocab_size)
    log_p = (logits64(twins[0], twin) / temperature).log_softmax(-1)
    exact = log_p.gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (ids >= 0)
    torch.testing.assert_close(ours, exact.detach().float(), rtol=1e-5, atol=2e-5)
    upstream = torch.linspace(-1, 2, ids.numel()).view(ids.shape) if upstream is None else upstream
    ours.backward(upstream)
    exact.backward(upstream.double())
    for leaf, other in zip(leaves, twins, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert relative_error(leaf.grad, other.grad) < tolerance


def problem(rows=(2, 5), vocabulary=701, dtype=torch.float32):
    count = rows[0] * rows[1]
    h, w, _ = states(count, 16, vocabulary, 0.1, dtype)
    ids = torch.randint(vocabulary, rows, generator=torch.Generator().manual_seed(2))
    return h.view(*rows, 16), LMHead(w), ids


def test_value_and_gradients(backend):
    check(*problem(), backend)


@pytest.mark.parametrize("view", ["every second", "a column", "one for all"])
def test_token_ids_in_any_layout(backend, view):
    h, head, ids = problem()
    ids = {
        "every second": torch.stack([ids, ids.roll(1)], -1).flatten(1)[:, ::2], "a column": ids.T.contiguous().T,
        "one for all": ids[:1, :1].expand(ids.shape),
    }[view]  # fmt: skip
    flat, ids = (h.flatten(0, 1), ids.reshape(-1)) if view != "every second" else (h[0], ids[0])
    check(flat, head, ids, backend)


def test_every_transform_and_positions_without_a_token(backend):
    h, head, ids = problem()
    g = torch.Generator().manual_seed(5)
    ids = ids.clamp(max=680)
    ids[0, 1] = ids[1, 4] = -100
    head = LMHead(head.weight, torch.randn(701, generator=g), 0.5, 5.0, vocab_size=690)
    check(h, head, ids, backend, temperature=0.8)
    h[0, 1] = float("nan")
    leaf = h.clone().requires_grad_()
    logp = fused_linear_logprobs(leaf, head, ids, backend=backend)
    logp.sum().backward()
    assert logp.isfinite().all() and leaf.grad.isfinite().all() and logp[0, 1] == 0 and not leaf.grad[0, 1].any()


def test_small_workspace_and_bf16(backend):
    check(*problem((1, 13)), backend, workspace_bytes=30_000)
    check(*problem((1, 13), dtype=torch.bfloat16), backend, tolerance=3e-3)


def test_a_forbidden_token_has_no_probability_and_no_gradient(backend):
    h, head, ids = problem((1, 3))
    bias = torch.zeros(701)
    bias[ids[0, 1]] = -float("inf")
    leaf = h.clone().requires_grad_()
    logp = fused_linear_logprobs(leaf, LMHead(head.weight, bias), ids, backend=backend)
    assert logp[0, 1] == -float("inf") and logp[0, [0, 2]].isfinite().all()
    logp.backward(torch.ones_like(logp))
    assert leaf.grad.isfinite().all() and not leaf.grad[0, 1].any() and leaf.grad[0, 0].any()


def test_gradcheck_and_gradients_asked_for():
    h, head, ids = problem((2, 2), vocabulary=9)
    h, w = h.double().requires_grad_(), head.weight.double().requires_grad_()
    torch.autograd.gradcheck(lambda h, w: fused_linear_logprobs(h, LMHead(w, softcap=3.0), ids), [h, w])
    assert not fused_linear_logprobs(h.detach(), w.detach(), ids).requires_grad
    fused_linear_logprobs(h, w.detach(), ids).sum().backward()
    assert h.grad is not None


def test_bad_input_says_what_and_what_instead(monkeypatch):
    h, head, ids = problem()
    for arguments, words in (
        ((h, head, ids[0]), ["token_ids", "(2, 5)"]),
        ((h, head, ids.float()), ["token_ids", "integers"]),
        ((h[..., :3], head, ids), ["hidden", "width 3", "16"]),
        ((h.long(), head, ids), ["hidden", "int64"]),
        ((h, head, ids > 3), ["token_ids", "integers"]),
        ((h, head, ids.clone().fill_(701)), ["token_ids holds 701", "701 tokens"]),
    ):
        with pytest.raises(ValueError) as error:
            fused_linear_logprobs(*arguments)
        assert all(word in str(error.value) for word in words), error.value
    torch.testing.assert_close(
        fused_linear_logprobs(h, head, ids.short()), fused_linear_logprobs(h, head, ids)
    )
    monkeypatch.setenv("OPCD_CHECK", "1")
    h[1, 2] = float("nan")
    with pytest.raises(ValueError, match="hidden: row 7"):
        fused_linear_logprobs(h, head, ids)

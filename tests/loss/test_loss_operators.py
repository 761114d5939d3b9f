"""The losses as operators: torch.compile without a graph break, checkpointing, CUDA-graph mode, main_grad."""

import pytest
import torch
from loss_oracle import relative_error, states
from torch.utils.checkpoint import checkpoint

from opcd_fast.loss import LMHead, fused_linear_divergence, fused_linear_logprobs, fused_linear_reverse_kl, reverse_kl
from opcd_fast.loss.chunks import Spec, rows
from opcd_fast.loss.operators import linear_divergence_op


def problem(count=7, dtype=torch.float32):
    h, w, h_t = states(count, 16, 301, 0.3, dtype)
    return h, w, h_t.to(dtype)


WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 0.5])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_weights": WEIGHTS, "return_stats": True},
        {"token_weights": WEIGHTS, "denominator": torch.tensor(9.0)},
        {"reduction": "sum", "divergence": "jsd", "beta": 0.3},
        {"reduction": "none", "divergence": "topk_reverse_kl", "k": 5},
        {"logprobs": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_compiles_into_one_graph_with_the_same_bits(options):
    h, w, h_t = problem()

    def step(h, w):
        if "logprobs" in options:
            return (fused_linear_logprobs(h * 2, w, torch.arange(7)) * WEIGHTS).sum()
        out = fused_linear_divergence(h * 2, LMHead(w, softcap=9.0), h_t, LMHead(w.detach()), **options)
        loss = out[0] + 0 * out[1].student_entropy.sum() if isinstance(out, tuple) else out
        return (loss * 3).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h_leaf, w_leaf = h.clone().requires_grad_(), w.clone().requires_grad_()
        loss = function(h_leaf, w_leaf)
        loss.backward()
        results.append((loss.detach(), h_leaf.grad, w_leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].any() and results[0][2].any()


def test_heads_of_changing_scale_compile():
    h, w, h_t = problem()

    def step(scale, softcap):
        return fused_linear_divergence(h, LMHead(w, scale=scale, softcap=softcap), h_t, w)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for scale, softcap in ((0.5, 9.0), (0.25, 8.0), (0.125, 7.0)):
        assert torch.equal(compiled(scale, softcap), step(scale, softcap))


@pytest.mark.parametrize("wanted", [(True, True, False), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_fake_implementation_matches_the_real_one(wanted, reduction):
    h, w, h_t = problem(dtype=torch.bfloat16)
    spec = Spec(301, all_statistics=True, softcap_s=3.0)
    tensors = (h, w, torch.zeros(301), h_t, w, None, WEIGHTS, torch.arange(7), None, None)
    arguments = (*tensors, wanted, reduction, 0.5, *spec.packed())
    torch.library.opcheck(linear_divergence_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    h, w, h_t = problem()
    results = []
    for wrap in (False, True):
        h_leaf, w_leaf = h.clone().requires_grad_(), w.clone().requires_grad_()

        def loss(h, w_leaf=w_leaf):
            return fused_linear_reverse_kl(h.tanh(), w_leaf, h_t, w)

        value = checkpoint(loss, h_leaf, use_reentrant=reentrant) if wrap else loss(h_leaf)
        value.backward()
        results.append((value.detach(), h_leaf.grad, w_leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_while_a_graph_is_captured_no_row_is_left_out_and_none_is_seen(monkeypatch):
    """Without the compaction, rows of weight 0 hold NaN here and must still leave no trace."""
    h, w, h_t = problem()
    results = []
    for captured in (False, True):
        monkeypatch.setattr(rows, "capturing", lambda device, captured=captured: captured)
        for bad in (False, captured):
            h_leaf, w_leaf, teacher = h.clone(), w.clone().requires_grad_(), h_t.clone()
            if bad:
                h_leaf[1], teacher[5] = float("nan"), float("inf")
            h_leaf.requires_grad_()
            found = []
            for extra in ({}, {"denominator": torch.tensor(9.0)}, {"divergence": "jsd"}):
                h_leaf.grad = w_leaf.grad = None
                loss, stats = fused_linear_divergence(
                    h_leaf, w_leaf, teacher, w, token_weights=WEIGHTS, return_stats=True, **extra
                )
                loss.backward()
                found += [loss.detach(), h_leaf.grad, w_leaf.grad, stats.token_kl, stats.student_entropy]
            results.append(found)
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=1e-5, atol=1e-7)
    leaf = h.clone().requires_grad_()
    loss = fused_linear_reverse_kl(leaf, w, h_t, w, token_weights=torch.zeros(7))
    loss.backward()
    assert float(loss.detach()) == 0 and not leaf.grad.any()


def test_logits_while_a_graph_is_captured(monkeypatch):
    g = torch.Generator().manual_seed(0)
    z_s, z_t = torch.randn(7, 33, generator=g), torch.randn(7, 33, generator=g)
    leaf = z_s.clone().requires_grad_()
    reverse_kl(leaf, z_t, token_weights=WEIGHTS).backward()
    monkeypatch.setattr(rows, "capturing", lambda device: True)
    z_s[1], z_t[5] = float("nan"), float("inf")
    captured = z_s.clone().requires_grad_()
    reverse_kl(captured, z_t, token_weights=WEIGHTS).backward()
    torch.testing.assert_close(captured.grad, leaf.grad, rtol=1e-5, atol=1e-7)
    kl = reverse_kl(z_s, z_t, token_weights=WEIGHTS, reduction="none")
    assert kl.isfinite().all() and not kl[[1, 5]].any() and kl[[0, 2]].all()
    with pytest.raises(RuntimeError, match="fused_linear_logprobs.*graph"):
        fused_linear_logprobs(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_is_added_to_main_grad(dtype):
    h, w, h_t = problem(dtype=dtype)
    plain = w.clone().requires_grad_()
    for scale in (9.0, torch.tensor(4.0)):
        loss = fused_linear_reverse_kl(h, plain, h_t, w, token_weights=WEIGHTS, denominator=scale)
        loss.backward()
    added = w.clone().requires_grad_()
    added.main_grad = torch.ones(w.shape, dtype=torch.float32)
    h_leaf = h.clone().requires_grad_()
    for scale in (9.0, torch.tensor(4.0)):
        loss = fused_linear_reverse_kl(
            h_leaf, added, h_t, w, token_weights=WEIGHTS, denominator=scale, accumulate_weight_grad=True
        )
        loss.backward()
    assert added.grad is None and h_leaf.grad.any()
    assert relative_error(added.main_grad - 1, plain.grad) < (1e-5 if dtype == torch.float32 else 3e-3)
    with torch.no_grad():
        before = added.main_grad.clone()
        fused_linear_reverse_kl(h, added, h_t, w, reduction="sum", accumulate_weight_grad=True)
        assert torch.equal(before, added.main_grad)


def test_megatrons_protocol_is_followed():
    """Its hook needs some gradient to run on, and a flag that tells it not to read it."""
    h, w, h_t = problem()
    weight = torch.nn.Parameter(w.clone())
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.zeros(w.shape), False, True
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append((p.grad is None, p.grad_added_to_main_grad)))
    fused_linear_reverse_kl(h, weight, h_t, w, reduction="sum", accumulate_weight_grad=True).backward()
    assert seen == [(False, True)] and not weight.grad.any() and weight.main_grad.any()


def test_a_float32_grad_serves_as_main_grad():
    h, w, h_t = problem()
    plain, added = w.clone().requires_grad_(), w.clone().requires_grad_()
    for leaf, accumulate in ((plain, False), (added, True)):
        for _ in range(2):
            fused_linear_reverse_kl(
                h, leaf, h_t, w, reduction="sum", accumulate_weight_grad=accumulate
            ).backward()
    torch.testing.assert_close(added.grad, plain.grad, rtol=1e-5, atol=1e-7)


def test_main_grad_is_refused_where_it_would_be_wrong():
    h, w, h_t = problem()
    weight = w.clone().requires_grad_()

    def call(weight=weight, **options):
        options = {"reduction": "sum", **options}
        return fused_linear_reverse_kl(h, weight, h_t, w, accumulate_weight_grad=True, **options)

    for options, words in (
        ({"reduction": "none"}, "denominator="),
        ({"reduction": "mean"}, "denominator="),
        ({"weight": weight * 1.0}, "parameter itself"),
        ({"weight": w.bfloat16().requires_grad_()}, "main_grad"),
        ({"weight": w.double().requires_grad_()}, "float64"),
    ):
        with pytest.raises(ValueError, match=words):
            call(**options)
    assert weight.grad is None
    with pytest.raises(RuntimeError, match="multiplied by 2"):
        (call() * 2).backward()
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="checkpoint"):
        checkpoint(lambda x: call() + x.sum(), x, use_reentrant=False).backward()

"""The losses on a device, in bf16, through GEMMs with float32 output and the compiled kernels."""

import pytest
import torch
from loss_oracle import divergence64, logits64, relative_error, states, token_kl64

from opcd_fast.loss import (
    LMHead,
    fused_linear_divergence,
    fused_linear_logprobs,
    fused_linear_reverse_kl,
    release_workspace,
)

pytestmark = pytest.mark.gpu
# 3 rows more than two multiples of 128; a vocabulary that is no multiple of 8; mean KL about 1 … 3e-5.
ROWS, WIDTH, VOCABULARY = 259, 256, 32_003


@pytest.mark.parametrize("spread", [0.78, 0.28, 0.09, 0.029, 0.0049])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("train_head", [False, True])
def test_accuracy_in_bf16(spread, backend, train_head):
    h, w, h_t = states(ROWS, WIDTH, VOCABULARY, spread)
    h, w, h_t = h.cuda().requires_grad_(), w.cuda().requires_grad_(train_head), h_t.bfloat16().cuda()
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_(train_head)
    exact = token_kl64(logits64(h64, LMHead(w64)), logits64(h_t, LMHead(w64.detach())))
    exact.mean().backward()
    loss, stats = fused_linear_reverse_kl(
        h, w, h_t, w.detach(), return_stats=True, backend=backend, workspace_bytes=96 << 20
    )
    loss.backward()
    exact = exact.detach()
    assert relative_error(h.grad, h64.grad) <= 3e-3
    if train_head:
        assert relative_error(w.grad, w64.grad) <= 3e-3
    assert (stats.token_kl >= 0).all()
    assert ((stats.token_kl - exact).abs() <= 3e-3 * exact + 1e-9).all()


@pytest.mark.parametrize("spread", [0.78, 0.09, 0.0049])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("divergence", ["reverse_kl", "gated_kl", "jsd"])
def test_differences_in_float16(spread, backend, train_head, divergence):
    h, w, h_t = states(ROWS, WIDTH, VOCABULARY, spread, boost=5.0)
    h, w, h_t = h.cuda().requires_grad_(), w.cuda().requires_grad_(train_head), h_t.bfloat16().cuda()
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_(train_head)
    z_s, z_t = logits64(h64, LMHead(w64)), logits64(h_t, LMHead(w64.detach()))
    exact = divergence64(z_s, z_t, divergence)
    exact.mean().backward()
    ids = torch.multinomial(z_s.detach().softmax(-1), 1)[:, 0]
    # With a product that may add up in float16, if the caller's setting were followed.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    loss, stats = fused_linear_divergence(
        h, w, h_t, w.detach(), divergence=divergence, return_stats=True, backend=backend, token_ids=ids,
        projection="auto" if backend == "triton" else "difference", workspace_bytes=128 << 20,
    )  # fmt: skip
    loss.backward()
    assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert stats.projection == "difference" and stats.repeated < ROWS // 4
    assert relative_error(h.grad, h64.grad) <= 3e-3
    if train_head:
        assert relative_error(w.grad, w64.grad) <= 3e-3
    exact = exact.detach()
    assert (stats.token_kl >= 0).all()
    assert ((stats.token_kl - exact).abs() <= 4e-3 * exact + 1e-9).all()
    assert (stats.student_logsumexp - z_s.detach().logsumexp(-1)).abs().max() < 2e-2


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_runs_give_the_same_bits(backend):
    results = []
    for _ in range(2):
        h, w, h_t = (x.cuda() for x in states(ROWS, WIDTH, VOCABULARY, 0.1))
        h.requires_grad_(), w.requires_grad_()
        fused_linear_reverse_kl(h, w, h_t.bfloat16(), w.detach(), backend=backend).backward()
        results.append((h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("rows", [40, ROWS])  # rows split over programs, and not
@pytest.mark.parametrize(
    "transform", [{"softcap": 5.0, "bias": True}, {"scale": 0.5}, {"bias": True}, {"vocab_size": 31_990}]
)
def test_transforms(transform, rows):
    h, w, h_t = (x.cuda() for x in states(rows, WIDTH, VOCABULARY, 0.1))
    if "bias" in transform:
        transform = {**transform, "bias": torch.randn(VOCABULARY, device="cuda", dtype=torch.bfloat16)}
    h.requires_grad_()
    h64 = h.detach().double().requires_grad_()
    head = LMHead(w, **transform)
    exact = token_kl64(logits64(h64, head), logits64(h_t.bfloat16(), head), 0.8)
    exact.mean().backward()
    loss = fused_linear_reverse_kl(h, head, h_t.bfloat16(), head, temperature=0.8)
    loss.backward()
    assert relative_error(h.grad, h64.grad) <= 3e-3


@pytest.mark.parametrize("train_head", [False, True])
def test_peak_memory(train_head):
    h, w, h_t = (x.cuda() for x in states(4096, 64, 151_936, 0.1))
    h.requires_grad_(), w.requires_grad_(train_head)
    h_t = h_t.bfloat16()
    workspace = 512 << 20
    fused_linear_reverse_kl(h[:1], w, h_t[:1], w.detach()).backward()  # cuBLAS workspaces, compilation
    h.grad = w.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (fused_linear_reverse_kl(h, w, h_t, w.detach(), workspace_bytes=workspace) / 3).backward()
    # dW in float32, scaled and rounded into another tensor.
    gradients = 2 * h.numel() * 2 + (w.numel() * (4 + 2) if train_head else 0)
    assert torch.cuda.max_memory_allocated() - before <= workspace + gradients + (8 << 20)


OTHERS = [
    ("forward_kl", {}),
    ("jsd", {"beta": 0.3}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("skew_forward_kl", {"alpha": 0.2}),
    ("topk_reverse_kl", {"k": 64, "tail": "bucket"}),
    ("gated_kl", {}),
    ("gated_kl", {"gate": "tv"}),
]


@pytest.mark.parametrize(("divergence", "options"), OTHERS)
@pytest.mark.parametrize("rows", [40, ROWS])  # rows split over programs, and not
def test_divergences_against_the_torch_backend_in_float64(divergence, options, rows):
    h, w, h_t = (x.cuda() for x in states(rows, WIDTH, VOCABULARY, 0.1))
    h.requires_grad_(), w.requires_grad_()
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = fused_linear_divergence(
        h64, w64, h_t.bfloat16().double(), w64.detach(), divergence=divergence, backend="torch", **options
    )
    exact.backward()
    loss = fused_linear_divergence(h, w, h_t.bfloat16(), w.detach(), divergence=divergence, backend="triton", **options)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-3)
    assert relative_error(h.grad, h64.grad) <= 3e-3 and relative_error(w.grad, w64.grad) <= 3e-3


def test_logprobs():
    h, w, _ = (x.cuda() for x in states(ROWS, WIDTH, VOCABULARY, 0.1))
    ids = torch.randint(VOCABULARY, (ROWS,), device="cuda")
    h.requires_grad_(), w.requires_grad_()
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    logp = fused_linear_logprobs(h, w, ids)
    exact = (h64 @ w64.T).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-4, atol=1e-4)
    logp.sum().backward(), exact.sum().backward()
    assert relative_error(h.grad, h64.grad) <= 3e-3 and relative_error(w.grad, w64.grad) <= 3e-3


def test_the_workspace_stays_between_calls_and_is_given_back():
    h, w, h_t = (x.cuda() for x in states(ROWS, WIDTH, VOCABULARY, 0.1))
    h.requires_grad_()
    held = []
    for rows in (ROWS, ROWS, ROWS // 2):
        (gradient,) = torch.autograd.grad(fused_linear_reverse_kl(h[:rows], w, h_t[:rows].bfloat16(), w), h)
        del gradient
        held.append(torch.cuda.memory_allocated())
    release_workspace()
    assert len(set(held)) == 1 and torch.cuda.memory_allocated() < held[0]


def test_a_cuda_graph_replays_the_loss_on_new_inputs():
    """Rows of weight 0 cannot be left out while a graph is captured; they are masked, whatever they hold."""
    h, w, h_t = (x.cuda() for x in states(ROWS, WIDTH, VOCABULARY, 0.1))
    h_t = h_t.bfloat16()
    weights = torch.ones(ROWS, device="cuda")

    def call():
        leaf = h.detach().requires_grad_()
        loss = fused_linear_reverse_kl(leaf, w, h_t, w, token_weights=weights)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = call()
    weights[5:9] = 0
    h[7] = float("nan")
    h[20] *= 1.5
    graph.replay()
    torch.cuda.synchronize()
    wanted_loss, wanted = call()
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    assert relative_error(gradient, wanted) < 1e-3 and not gradient[7].any()


def test_torch_compile_keeps_one_graph():
    h, w, h_t = (x.cuda() for x in states(ROWS, WIDTH, VOCABULARY, 0.1))
    h_t = h_t.bfloat16()

    def step(h):
        return fused_linear_reverse_kl(h * 2, w, h_t, w)

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = h.detach().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and relative_error(results[1][1], results[0][1]) < 1e-6


def test_main_grad_takes_the_weight_gradient():
    h, w, h_t = (x.cuda() for x in states(ROWS, WIDTH, VOCABULARY, 0.1))
    h_t = h_t.bfloat16()
    plain, added = w.clone().requires_grad_(), w.clone().requires_grad_()
    added.main_grad = torch.zeros(w.shape, device="cuda")
    fused_linear_reverse_kl(h, plain, h_t, w, denominator=7.0).backward()
    loss = fused_linear_reverse_kl(h, added, h_t, w, denominator=7.0, accumulate_weight_grad=True)
    if loss.requires_grad:
        loss.backward()
    assert added.grad is None and relative_error(added.main_grad, plain.grad) < 3e-3

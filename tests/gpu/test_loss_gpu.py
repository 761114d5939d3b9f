"""The loss on a device, in bf16, through its GEMMs with float32 output and the compiled row kernel."""

import pytest
import torch
from loss_oracle import logits64, relative_error, states, token_kl64

from opcd_fast.loss import LMHead, fused_linear_reverse_kl

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


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_runs_give_the_same_bits(backend):
    results = []
    for _ in range(2):
        h, w, h_t = (x.cuda() for x in states(ROWS, WIDTH, VOCABULARY, 0.1))
        h.requires_grad_(), w.requires_grad_()
        fused_linear_reverse_kl(h, w, h_t.bfloat16(), w.detach(), backend=backend).backward()
        results.append((h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("transform", [{"softcap": 5.0}, {"scale": 0.5}, {"bias": True}, {"vocab_size": 31_990}])
def test_transforms(transform):
    h, w, h_t = (x.cuda() for x in states(40, WIDTH, VOCABULARY, 0.1))
    if "bias" in transform:
        transform = {"bias": torch.randn(VOCABULARY, device="cuda", dtype=torch.bfloat16)}
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
    fused_linear_reverse_kl(h, w, h_t, w.detach(), workspace_bytes=workspace).backward()
    gradients = 2 * h.numel() * 2 + (w.numel() * (4 + 2 + 2) if train_head else 0)
    assert torch.cuda.max_memory_allocated() - before <= workspace + gradients + (8 << 20)

"""The host loop as it runs on a device with bf16 inputs, with the device's GEMMs stood in for.

Here no GEMM reads bf16 and writes float32, so `torch.mm(..., out_dtype=)` is replaced by a float32 product
of the same values. What is tested is everything around it: which buffers, which rows, G in bf16 of its own or
over the teacher's logits, several logit chunks to a gradient chunk.
"""

import pytest
import torch
from loss_oracle import logits64, relative_error, states, token_kl64

from opcd_fast.kernels.csrc import native
from opcd_fast.loss import LMHead, fused_linear_reverse_kl
from opcd_fast.loss.chunks import products, workspace

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture
def bf16_gemms(monkeypatch):
    mm, addmm = torch.mm, torch.addmm
    calls = []

    def wide_mm(a, b, out_dtype=None, *, out=None):
        if out_dtype is None:
            return mm(a, b, out=out)
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        calls.append("mm")
        return mm(a.float(), b.float(), out=out)

    def wide_addmm(c, a, b, out_dtype=None, *, beta=1.0, alpha=1.0, out=None):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == c.dtype == torch.float32
        calls.append("addmm")
        return addmm(c, a.float(), b.float(), beta=beta, alpha=alpha, out=out)

    def runs_native(side):
        return side.h.dtype == side.weight.dtype == torch.bfloat16

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    for module in (products, workspace):
        monkeypatch.setattr(module, "runs_native", runs_native)
    return calls


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize(("backend", "bytes_"), [("torch", 150_000), ("triton", 40_000), ("triton", 10**6)])
def test_bf16_gradients_through_every_buffer_layout(bf16_gemms, backend, bytes_, train_head):
    if backend == "triton":
        pytest.importorskip("triton")
    h, w, h_t = states(19, 16, 610, 0.1)
    h_t = h_t.bfloat16()
    weights = torch.ones(19)
    weights[4] = 0.0
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    exact = token_kl64(logits64(h64, LMHead(w64)), logits64(h_t, LMHead(w)))
    (exact * weights).sum().div(18).backward()
    h.requires_grad_(), w.requires_grad_(train_head)
    loss, stats = fused_linear_reverse_kl(
        h, w, h_t, w.detach(), token_weights=weights, return_stats=True, backend=backend, workspace_bytes=bytes_
    )
    loss.backward()
    assert ("addmm" in bf16_gemms) == train_head
    torch.testing.assert_close(stats.token_kl, (exact * weights).detach().float(), rtol=1e-3, atol=1e-8)
    # The interpreter truncates when it stores bf16, a device rounds: twice the error of G.
    limit = 6e-3 if backend == "triton" else 3e-3
    assert relative_error(h.grad, h64.grad) < limit
    if train_head:
        assert relative_error(w.grad, w64.grad) < limit


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_one_shared_head_and_hidden_states_of_two_dtypes(bf16_gemms, dtypes):
    """One side multiplies the head as it is, the other an upcast copy of it."""
    h, w, h_t = states(9, 16, 610, 0.1)
    h, h_t = h.to(dtypes[0]).requires_grad_(), h_t.to(dtypes[1])
    h64 = h.detach().double().requires_grad_()
    token_kl64(logits64(h64, LMHead(w)), logits64(h_t, LMHead(w))).mean().backward()
    fused_linear_reverse_kl(h, w, h_t, w, backend="torch").backward()
    assert "mm" in bf16_gemms and relative_error(h.grad, h64.grad) < 3e-3


def test_the_device_gemms_exist_with_this_signature():
    """On a CPU they are not implemented, which is another error than a signature nobody knows."""
    a, b = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError):
        torch.mm(a, b, out_dtype=torch.float32, out=torch.empty(2, 4))
    with pytest.raises(NotImplementedError):
        torch.addmm(torch.zeros(2, 4), a, b, out_dtype=torch.float32, out=torch.empty(2, 4))


def test_bf16_models_on_a_cpu_with_bf16_arithmetic(monkeypatch):
    """Where the CPU multiplies bf16 the logits come from the library's own product; here it is emulated."""
    if not native.available():
        pytest.skip(native.status())
    products_run = []
    product = native.project_bf16

    def watched(h, weight, out):
        products_run.append((h.dtype, weight.dtype, tuple(out.shape)))
        product(h, weight, out)

    h, w, h_t = states(11, 40, 610, 0.03)
    h_t = h_t.bfloat16()
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    token_kl64(logits64(h64, LMHead(w64)), logits64(h_t, LMHead(w))).mean().backward()
    h.requires_grad_(), w.requires_grad_()
    monkeypatch.setattr(native, "has_bf16_dot", lambda: True)
    monkeypatch.setattr(native, "project_bf16", watched)
    fused_linear_reverse_kl(h, w, h_t, w.detach(), backend="native").backward()
    assert products_run == [(torch.bfloat16, torch.bfloat16, (11, 610))] * 2
    assert relative_error(h.grad, h64.grad) < 3e-3 and relative_error(w.grad, w64.grad) < 3e-3

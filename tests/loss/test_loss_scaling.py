"""The upstream gradient reaches the loss's gradients in one rounding and without a second copy of them."""

import pytest
import torch
from loss_oracle import relative_error, states
from memory_record import MB, peak_bytes

from opcd_fast.loss import fused_linear_reverse_kl

THIRD = torch.tensor(1.0) / 3  # not a bf16 number


def leaves(dtype, rows=9, vocabulary=10_007, width=16):
    h, w, h_t = states(rows, width, vocabulary, 0.3, torch.float32)
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), h_t.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scaled_gradients_are_rounded_once(dtype):
    h, w, h_t = leaves(dtype)
    call = lambda: fused_linear_reverse_kl(h, w, h_t, w.detach())  # noqa: E731
    plain = torch.autograd.grad(call(), (h, w))
    found = torch.autograd.grad(call() * THIRD, (h, w))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for scaled, before in zip(found, plain, strict=True):
        assert scaled.dtype == dtype
        late = dtype == torch.float16 or (dtype == torch.bfloat16 and before is plain[1])
        if late:  # kept in float32 until now, so that the scaled one is the better
            assert relative_error(scaled, before.double() / 3) < torch.finfo(dtype).eps
        else:
            assert torch.equal(scaled, (before.to(wide) * THIRD.to(wide)).to(dtype))


@pytest.mark.parametrize("denominator", [7.0, torch.tensor(7.0)])
def test_a_weights_gradient_is_rounded_after_the_last_factor(denominator):
    h, w, h_t = leaves(torch.bfloat16)
    options = {"denominator": denominator}
    (found,) = torch.autograd.grad(fused_linear_reverse_kl(h, w, h_t, w.detach(), **options) * THIRD, w)
    w.main_grad = torch.zeros_like(w, dtype=torch.float32)  # the same sums, up to rounding
    fused_linear_reverse_kl(h, w, h_t, w.detach(), accumulate_weight_grad=True, **options)
    exact = w.main_grad.double() / 3
    half_a_unit = exact.abs() * 2**-8 + 1e-6 * exact.abs().max()  # of the last place; sums are not always in one order
    assert found.dtype == torch.bfloat16 and bool(((found.double() - exact).abs() <= half_a_unit).all())


def test_a_graph_that_is_kept_is_scaled_anew_and_its_gradients_are_the_callers_own():
    h, w, h_t = leaves(torch.bfloat16)
    plain = torch.autograd.grad(fused_linear_reverse_kl(h, w, h_t, w.detach()), (h, w))
    loss = fused_linear_reverse_kl(h, w, h_t, w.detach())
    kept = []
    for factor in (THIRD, torch.tensor(1.0), torch.tensor(2.0), THIRD):
        found = torch.autograd.grad(loss * factor, (h, w), retain_graph=True)
        kept.append([gradient.clone() for gradient in found])
        for gradient in found:
            gradient.zero_()  # as clipping changes them in place
    thirds, ones, twice, again = kept
    for third, one, two, other, unscaled in zip(thirds, ones, twice, again, plain, strict=True):
        assert torch.equal(third, other) and torch.equal(one, unscaled) and torch.equal(two, 2 * unscaled)


@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, 0), (torch.bfloat16, 2 * 4096 * 64 * 4)])
def test_scaling_holds_no_second_gradient(dtype, more):
    """But the one of another type that it writes."""
    h, w, h_t = leaves(dtype, vocabulary=65_536, width=64)
    more += w.nbytes if dtype == torch.bfloat16 else 0
    for factor in (1.0, 0.3):
        w.grad = None
        loss = fused_linear_reverse_kl(h, w, h_t, w.detach()) * factor
        assert peak_bytes(loss.backward) <= more + MB // 4  # dW is 16 or 8 MiB
    # The meter sees a copy where there is one.
    loss = fused_linear_reverse_kl(h, w, h_t, w.detach()) * 0.3
    assert peak_bytes(lambda: loss.backward(retain_graph=True)) >= w.numel() * w.itemsize

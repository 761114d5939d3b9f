"""The ways to get the loss's gradients that are timed side by side.

Each takes the inputs and returns a call that computes forward and backward once and returns dL/dh, and dL/dW
where the head is trained. All compute the mean over the N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss_cases import Case, Inputs
from opcd_fast.loss import fused_linear_reverse_kl

Call = Callable[[], tuple[Tensor, ...]]
BOUND = "gemms"


@dataclass(frozen=True)
class Implementation:
    name: str
    build: Callable[[Inputs], Call]
    ours: bool = False
    exact: bool = True
    is_loss: bool = True  # False: only the matrix products, nothing to compare with the oracle


def implementations(case: Case, device: torch.device) -> list[Implementation]:
    """What is compared in one case, in the order in which every round runs them."""
    backends = ("triton", "torch") if device.type == "cuda" else ("native", "torch")
    chosen = [
        Implementation(f"opcd_fast-{name}", partial(_ours, name), ours=True)
        for name in backends
        if name != "native" or _has_native()
    ]
    chosen.append(Implementation("eager-fp32", partial(_eager, _fp32_logits)))
    if case.dtype == torch.bfloat16:
        chosen.append(Implementation("eager-bf16-logits", partial(_eager, _bf16_logits), exact=False))
    chosen.append(Implementation(BOUND, _gemms, is_loss=False))
    return chosen


def _has_native() -> bool:
    """Whether this installation built the compiled CPU backend; without it there is nothing to time."""
    tiny = torch.zeros(1, 8)
    try:
        fused_linear_reverse_kl(tiny, tiny, tiny, tiny, backend="native")
    except ValueError:
        return False
    return True


def _ours(backend: str, inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        loss = fused_linear_reverse_kl(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t, backend=backend)
        return torch.autograd.grad(loss, inputs.wanted())

    return call


def _fp32_logits(h: Tensor, weight: Tensor) -> Tensor:
    """Exact in plain PyTorch: autograd knows no product of bf16 matrices with a float32 result, so the
    matrices themselves are made float32."""
    return F.linear(h.float(), weight.float())


def _bf16_logits(h: Tensor, weight: Tensor) -> Tensor:
    """What a trainer does that takes a bf16 model's `.logits` and calls `.float()` on them: the softmax is
    exact, its input is not."""
    return F.linear(h, weight).float()


def _eager(logits: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            log_q = torch.log_softmax(logits(inputs.h_t, inputs.w_t), -1)
        log_p = torch.log_softmax(logits(inputs.h_s, inputs.w_s), -1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return torch.autograd.grad(loss, inputs.wanted())

    return call


def _gemms(inputs: Inputs) -> Call:
    """The bound: both logits, dH and, unless the head is frozen, dW, in the inputs' dtype and nothing else.

    One buffer holds the logits and then stands for their gradient: random numbers, not zeros, on which matrix
    units run faster than on anything real. On a CPU the buffers are made beforehand, because there the first
    touch of fresh memory costs time; on a GPU they would take memory from the others.
    """
    h_s, w_s, h_t, w_t = inputs.h_s.detach(), inputs.w_s.detach(), inputs.h_t, inputs.w_t
    trained = inputs.w_s.requires_grad

    def buffers() -> tuple[Tensor, ...]:
        z = h_s.new_empty(h_s.shape[0], w_s.shape[0])
        return (z, torch.empty_like(h_s), torch.empty_like(w_s)) if trained else (z, torch.empty_like(h_s))

    kept = None if h_s.is_cuda else buffers()

    def call() -> tuple[Tensor, ...]:
        z, dh, *dw = buffers() if kept is None else kept
        torch.mm(h_s, w_s.t(), out=z)
        torch.mm(h_t, w_t.t(), out=z)
        torch.mm(z, w_s, out=dh)
        if dw:
            torch.mm(z.t(), h_s, out=dw[0])
        return (dh, *dw)

    return call

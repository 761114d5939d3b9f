"""The ways to get the loss's gradients that are timed side by side.

Each takes the inputs and returns a call that computes forward and backward once and returns dL/dh, and dL/dW
where the head is trained. All compute the mean over the N rows.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.loss_cases import Case, Inputs
from benchmarks.schema import BOUND
from opcd_fast.loss import fused_linear_reverse_kl

Call = Callable[[], tuple[Tensor, ...]]
SWEPT = ("trl", "liger-fused", BOUND)  # beside ours, in the cases that vary one size


@dataclass(frozen=True)
class Implementation:
    name: str
    build: Callable[[Inputs], Call]
    ours: bool = False
    exact: bool = True
    is_loss: bool = True  # False: only the matrix products, nothing to compare with the oracle
    skip: str | None = None  # why it cannot run here

    @property
    def compiles(self) -> bool:
        """Whether its first call on a CPU runs torch.compile, whose own memory is no part of the call's."""
        return self.name.startswith("compile-") or self.name == "liger-chunked"


def implementations(case: Case, device: torch.device) -> list[Implementation]:
    """What is compared in one case, in the order in which every round runs them.

    All of it in the main cases; for accuracy all losses but the compiled twins, which err as the eager ones do; in
    the sweeps ours, the fused peers and plain PyTorch as one would write it; for the size of the workspace, which
    no peer has, ours alone with the bound.
    """
    ours = _our_backends(case, device)
    if case.group == "workspace":
        return [*ours, _bound()]
    others = [*_peers(case, device), *_plain(case, device), _bound()]
    if case.group == "accuracy":
        others = [other for other in others if other.is_loss and not other.name.startswith("compile-")]
    elif case.group != "main":
        kept = (*SWEPT, "eager-bf16-logits" if case.dtype == torch.bfloat16 else "eager-fp32")
        others = [other for other in others if other.name in kept and not other.skip]
    return [*ours, *others]


def _our_backends(case: Case, device: torch.device) -> list[Implementation]:
    if device.type != "cuda":
        names = ["native", "torch"] if _has_native() else ["torch"]
    else:
        # The reference is slow there and says nothing about speed.
        names = ["triton", "torch"] if case.group == "accuracy" else ["triton"]
    return [
        Implementation(f"opcd_fast-{name}", partial(_ours, name, case.workspace_bytes), ours=True) for name in names
    ]


def _peers(case: Case, device: torch.device) -> list[Implementation]:
    fused_exact = peers.liger_fused_is_exact(device, case.dtype)
    found = (
        ("trl", peers.trl, True),
        ("liger-fused", peers.liger_fused, fused_exact),
        ("liger-chunked", peers.liger_chunked, case.dtype == torch.float32),
    )
    return [Implementation(name, build, exact=exact, skip=peers.why_not(name, device)) for name, build, exact in found]


def _plain(case: Case, device: torch.device) -> list[Implementation]:
    """Plain PyTorch: exact, and for bf16 what one would write; that one compiled as well."""
    chosen = [Implementation("eager-fp32", partial(_eager, _fp32_logits))]
    no_compile = peers.why_no_compile(device)
    if case.dtype == torch.bfloat16:
        chosen.append(Implementation("eager-bf16-logits", partial(_eager, _bf16_logits), exact=False))
        compiled = partial(_compiled, _bf16_logits)
        chosen.append(Implementation("compile-bf16-logits", compiled, exact=False, skip=no_compile))
    else:
        chosen.append(Implementation("compile-fp32", partial(_compiled, _fp32_logits), skip=no_compile))
    return chosen


def _bound() -> Implementation:
    return Implementation(BOUND, _gemms, is_loss=False)


@functools.cache
def _has_native() -> bool:
    """Whether this installation built the compiled CPU backend; without it there is nothing to time."""
    tiny = torch.zeros(1, 8)
    try:
        fused_linear_reverse_kl(tiny, tiny, tiny, tiny, backend="native")
    except ValueError:
        return False
    return True


def _ours(backend: str, workspace_bytes: int | None, inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        loss = fused_linear_reverse_kl(
            inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t, backend=backend, workspace_bytes=workspace_bytes
        )
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


def _mean_kl(logits: Callable[[Tensor, Tensor], Tensor], h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    with torch.no_grad():
        log_q = torch.log_softmax(logits(h_t, w_t), -1)
    log_p = torch.log_softmax(logits(h_s, w_s), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _eager(logits: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Call:
    return _differentiated(partial(_mean_kl, logits), inputs)


def _compiled(logits: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Call:
    return _differentiated(_compiled_mean_kl(logits), inputs)


@functools.cache
def _compiled_mean_kl(logits: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    # One graph for each shape; fullgraph makes too many of them an error instead of a silent return to eager.
    return torch.compile(partial(_mean_kl, logits), dynamic=False, fullgraph=True)


def _differentiated(loss: Callable[..., Tensor], inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        value = loss(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t)
        return torch.autograd.grad(value, inputs.wanted())

    return call


def forget_compiled() -> None:
    """Drop compiled graphs: the next case's shapes shall not meet torch.compile's limit of graphs."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()


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

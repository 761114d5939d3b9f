"""The loss: ways to get its gradients, timed side by side, and how far each is from the exact ones.

Each computes forward and backward of the mean over the N rows once, and returns dL/dh, and dL/dW where the head is
trained. Time, peak memory and the gradients' error against float64 are measured for every one. Other libraries are part
of it where they are installed, and rows "skipped" with the reason where they are not.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.loss_cases import ORACLE_ROWS, Case, Inputs, cases, make_inputs, oracle, oracle_rows
from benchmarks.measure import release
from benchmarks.schema import BOUND, Row, Value, Values, value
from benchmarks.session import Contender, Session, Wrong, in_groups
from opcd_fast.kernels.csrc import native
from opcd_fast.loss import fused_linear_reverse_kl

Call = Callable[[], tuple[Tensor, ...]]
SWEPT = ("trl", "liger-fused")  # beside ours, in the cases that vary one size
DIFFERENCE = "opcd_fast-difference"  # of a shared head's logits; `projection="auto"` takes it with Triton
ACCURACY = 3e-3  # of our gradients; rounding to bf16 alone is 1.7e-3


def run(session: Session, *, groups: tuple[str, ...] = (), only: tuple[str, ...] = (),
        case_seconds: float = 8.0) -> None:  # fmt: skip
    """groups: main, accuracy, N, V, D, workspace. only: implementations. case_seconds: of timing a case; 3 rounds at
    least."""
    for case in in_groups(cases(session.device, session.dry), groups):
        measure(session, case, only=only, seconds=case_seconds)


def measure(session: Session, case: Case, *, only: Sequence[str] = (), seconds: float = 8.0) -> dict[str, Row]:
    """The rows of one case, by implementation."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()  # the next case's shapes shall not meet torch.compile's limit of graphs
    made = functools.cache(lambda: Prepared(case, session.device))
    rows = session.compare(
        case.name, contenders(case, session.device, made), shape=shape_of(case), settings=settings_of(case),
        group=case.group, seconds=seconds if case.timed else None, only=only,
    )  # fmt: skip
    made.cache_clear()
    release(session.device)
    return rows


def shape_of(case: Case) -> dict[str, int]:
    workspace = {} if case.workspace_bytes is None else {"workspace_bytes": case.workspace_bytes}
    return {"N": case.N, "V": case.V, "D": case.D, **workspace}


def settings_of(case: Case) -> dict[str, str]:
    return {"dtype": case.dtype_name, "head": "frozen" if case.frozen else "full"}


class Prepared:
    """Inputs and what is right, made once for all contenders of a case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.inputs = inputs = make_inputs(case, device)
        # For the weight's gradient the oracle must see every row.
        whole = not case.timed and not case.frozen
        self.index = index = oracle_rows(inputs.h_s, case.N if whole else ORACLE_ROWS)
        kl, *exact = oracle(inputs.h_s[index], inputs.w_s, inputs.h_t[index], inputs.w_t, weight=whole)
        self.exact = [gradient.div_(case.N) for gradient in exact if gradient is not None]
        self.mean_kl = float(kl.mean())

    def judge(self, one: str, gradients: Sequence[Tensor]) -> Values:
        """||found - exact|| / ||exact|| of dL/dh on the rows compared, and of dL/dW where there is a reference for it.
        Raises Wrong where ours is too far off."""
        found = (gradients[0][self.index], *gradients[1:])
        values: Values = {}
        for name, gradient, right in zip(("dL/dh", "dL/dW"), found, self.exact):
            error = float((gradient.double() - right).norm() / right.norm())
            values[name] = replace(value(error, "1"), count=len(self.index))
        worst = max(error.value or 0.0 for error in values.values())
        values["mean_kl"] = Value(self.mean_kl, "nats")
        if one.startswith("opcd_fast") and worst > ACCURACY:
            raise Wrong(f"the gradient is off by {worst:.1e}; at most {ACCURACY}", values)
        return values


def contenders(case: Case, device: torch.device, made: Callable[[], Prepared]) -> list[Contender]:
    """What is compared in one case, in the order in which every round runs them.

    All of it in the main cases; for accuracy all losses but the compiled twins, which err as the eager ones do; in
    the sweeps ours, the fused peers and plain PyTorch as one would write it; for the size of the workspace, which
    no peer has, ours alone with the bound.
    """
    bf16 = case.dtype == torch.bfloat16

    def one(name: str, loss: Callable[..., Tensor], exact: bool = True, drawn: bool = False) -> Contender:
        def build() -> Call:
            inputs = made().inputs
            return _differentiated(partial(loss, token_ids=inputs.ids) if drawn else loss, inputs)

        return Contender(
            name, build, lambda found: made().judge(name, found),
            settings={} if exact else {"gradient": "inexact"},
            compiles=name.startswith("compile-") or name == "liger-chunked", has_peak=case.timed,
        )  # fmt: skip

    reverse_kl = partial(fused_linear_reverse_kl, workspace_bytes=case.workspace_bytes)
    backends = _backends(case, device)
    ours = [one(f"opcd_fast-{backend}", partial(reverse_kl, backend=backend)) for backend in backends]
    if case.frozen and bf16 and (device.type == "cuda" or case.head == "tiny"):  # a CPU's default has no use for it
        differences = partial(reverse_kl, backend=backends[0], projection="difference")
        ours.insert(0, one(DIFFERENCE, differences, drawn=True))
    bound = Contender(BOUND, lambda: _gemms(made().inputs), has_peak=False)
    if case.group == "workspace":
        return [*ours, bound]
    usual, logits = ("bf16-logits", _bf16_logits) if bf16 else ("fp32", _fp32_logits)
    others = [
        one("trl", peers.trl),
        one("liger-fused", peers.liger_fused, peers.liger_fused_is_exact(device, case.dtype)),
        one("liger-chunked", peers.liger_chunked, exact=not bf16),
        one("eager-fp32", partial(_mean_kl, _fp32_logits)),
        *([one("eager-bf16-logits", partial(_mean_kl, _bf16_logits), exact=False)] if bf16 else []),
    ]
    if case.group == "accuracy":
        return [*ours, *others]
    others.append(one(f"compile-{usual}", lambda *inputs: _compiled(logits)(*inputs), exact=not bf16))
    if case.group != "main":
        others = [other for other in others if other.name in (*SWEPT, f"eager-{usual}")]
    return [*ours, *others, bound]


def _backends(case: Case, device: torch.device) -> list[str]:
    if device.type != "cuda":
        return ["native", "torch"] if native.available() else ["torch"]
    # The reference is slow there and says nothing about speed.
    return ["triton", "torch"] if case.group == "accuracy" else ["triton"]


# --- ways to compute the mean reverse KL: called with (h_s, w_s, h_t, w_t) ------------------------------------


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


@functools.cache
def _compiled(logits: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    peers.needs_compiler()
    # One graph for each shape; fullgraph makes too many of them an error instead of a silent return to eager.
    return torch.compile(partial(_mean_kl, logits), dynamic=False, fullgraph=True)


def _differentiated(loss: Callable[..., Tensor], inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t), inputs.wanted())

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

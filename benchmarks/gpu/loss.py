"""The four main cases of the loss beside peers and the bare products, and what the products cost by their rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import loss
from benchmarks.gpu.kernel_times import profiled
from benchmarks.loss_cases import Case, cases, make_inputs
from benchmarks.measure import release, timed
from benchmarks.schema import BOUND, OURS, Values, value
from benchmarks.session import Session, in_groups
from opcd_fast.loss import fused_linear_reverse_kl
from opcd_fast.loss.chunks import pitch_of

WANTED = (BOUND, loss.DIFFERENCE, *OURS, "trl", "liger-fused")
SECONDS = 5.0  # of timing a case
LOGIT_ROWS = (256, 512, 640, 768, 1024, 1280, 1536, 2048)  # that a chunk can have
GRADIENT_ROWS = (640, 1280, 1920, 2560, 3200, 3840, 4224)


def run(session: Session) -> None:
    for case in main_cases(session):
        loss.measure(session, case, only=WANTED, seconds=SECONDS)
        session.row(f"{case.name}, parts", partial(_parts, case, session.device), shape=loss.shape_of(case), needs=3)
        release(session.device)
    v = 1000 if session.dry else 151_936
    for d in (64, 128) if session.dry else (1024, 4096):
        for name, product, rows in (("logits", _logits, LOGIT_ROWS), ("dH", _hidden, GRADIENT_ROWS),
                                    ("dW", _weight, GRADIENT_ROWS)):  # fmt: skip
            session.row(f"product {name}, D {d}", partial(_rates, session, product, rows, v, d), shape={"V": v, "D": d})


def main_cases(session: Session) -> list[Case]:
    return in_groups(cases(session.device, session.dry), ["main"])[: 2 if session.dry else 4]


def _parts(case: Case, device: torch.device) -> Values:
    """Where the time of ours goes, kernel by kernel."""
    inputs = make_inputs(case, device)

    def call() -> Any:
        loss = fused_linear_reverse_kl(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t)
        return torch.autograd.grad(loss, inputs.wanted())

    return profiled(call, device)


# --- products by the rows of a chunk: TFLOP/s ---------------------------------------------------------------


def _rates(session: Session, product: Callable[..., Any], rows: tuple[int, ...], v: int, d: int) -> Values:
    values: Values = {}
    for n in (8, 16) if session.dry else rows:
        found = timed(product(session.device, n, v, d), session.device, 0.15)
        values[f"{n}"] = value(2 * n * v * d / (found.value or 1.0) / 1e9, "TFLOP/s")
    return values


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def _float32(function: Callable[..., Any], *tensors: torch.Tensor, **options: Any) -> Any:
    """As the loss calls it; a CPU has no product with another output type."""
    if tensors[0].is_cuda:
        return function(*tensors, out_dtype=torch.float32, **options)
    return function(*(x.float() for x in tensors), **options)


def _logits(device: torch.device, n: int, v: int, d: int) -> Callable[[], Any]:
    h, w = _random(device, n, d), _random(device, v, d)
    z = torch.empty(n, pitch_of(v), device=device)[:, :v]
    return lambda: _float32(torch.mm, h, w.t(), out=z)


def _hidden(device: torch.device, n: int, v: int, d: int) -> Callable[[], Any]:
    g, w = _random(device, n, pitch_of(v))[:, :v], _random(device, v, d)
    return lambda: _float32(torch.mm, g, w)


def _weight(device: torch.device, n: int, v: int, d: int) -> Callable[[], Any]:
    g, h = _random(device, n, pitch_of(v))[:, :v], _random(device, n, d)
    dw = torch.zeros(v, d, device=device)
    return lambda: _float32(torch.addmm, dw, g.t(), h, beta=1.0, alpha=1e-3, out=dw)

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
from benchmarks.session import Session
from opcd_fast.loss import fused_linear_reverse_kl
from opcd_fast.loss.chunks import pitch_of

WANTED = (BOUND, *OURS, "trl", "liger-fused")
SECONDS = 5.0  # of timing a case
LOGIT_ROWS = (256, 512, 640, 768, 1024, 1280, 1536, 2048)
GRADIENT_ROWS = (640, 1280, 1920, 2560, 3200, 3840, 4224)


def run(session: Session) -> None:
    for case in main_cases(session):
        loss.measure(session, case, only=WANTED, seconds=SECONDS, needs=4)
        session.row(f"{case.name}, parts", partial(_parts, case, session.device), shape=loss.shape_of(case), needs=3)
        release(session.device)
    v = 1000 if session.dry else 151_936
    for d in (64, 128) if session.dry else (1024, 4096):
        for name, measure in (("logits", _logits), ("dH", _hidden), ("dW", _weight)):
            session.row(f"product {name}, D {d}", partial(measure, session, v, d), shape={"V": v, "D": d})


def main_cases(session: Session) -> list[Case]:
    found = [case for case in cases(session.device, session.dry) if case.group == "main"]
    return found[: 2 if session.dry else 4]


def _parts(case: Case, device: torch.device) -> Values:
    """Where the time of ours goes, kernel by kernel."""
    inputs = make_inputs(case, device)

    def call() -> Any:
        loss = fused_linear_reverse_kl(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t)
        return torch.autograd.grad(loss, inputs.wanted())

    return profiled(call, device)


# --- products of the rows that a chunk can have: TFLOP/s ----------------------------------------------------


def _rates(
    session: Session, v: int, d: int, rows: tuple[int, ...], build: Callable[[int], Callable[[], Any]]
) -> Values:
    values: Values = {}
    for count in (8, 16) if session.dry else rows:
        found = timed(build(count), session.device, 0.15)
        values[f"{count}"] = value(2 * count * v * d / (found.value or 1.0) / 1e9, "TFLOP/s")
    return values


def _random(session: Session, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=session.device, dtype=torch.bfloat16)


def _float32(session: Session, function: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
    """As the loss calls it; a CPU has no product with another output type."""
    if session.device.type == "cuda":
        return function(*tensors, out_dtype=torch.float32, **options)
    return function(*(x.float() for x in tensors), **options)


def _logits(session: Session, v: int, d: int) -> Values:
    w = _random(session, v, d)

    def build(rows: int) -> Callable[[], Any]:
        h, z = _random(session, rows, d), torch.empty(rows, pitch_of(v), device=session.device)[:, :v]
        return lambda: _float32(session, torch.mm, h, w.t(), out=z)

    return _rates(session, v, d, LOGIT_ROWS, build)


def _hidden(session: Session, v: int, d: int) -> Values:
    w = _random(session, v, d)

    def build(rows: int) -> Callable[[], Any]:
        g = _random(session, rows, pitch_of(v))[:, :v]
        return lambda: _float32(session, torch.mm, g, w)

    return _rates(session, v, d, GRADIENT_ROWS, build)


def _weight(session: Session, v: int, d: int) -> Values:
    dw = torch.zeros(v, d, device=session.device)

    def build(rows: int) -> Callable[[], Any]:
        g, h = _random(session, rows, pitch_of(v))[:, :v], _random(session, rows, d)
        return lambda: _float32(session, torch.addmm, dw, g.t(), h, beta=1.0, alpha=1e-3, out=dw)

    return _rates(session, v, d, GRADIENT_ROWS, build)

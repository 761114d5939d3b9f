"""The four main cases of the loss beside peers and the bare products, and what the products cost by their rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from benchmarks.gpu.kernel_times import profiled
from benchmarks.gpu.session import Session, Skip, Values
from benchmarks.loss_cases import KLS, Case, Inputs, cases, make_inputs
from benchmarks.loss_implementations import Implementation, implementations
from benchmarks.measure import SLOW, release, timed, with_peak
from benchmarks.phase_rows import times, value
from benchmarks.schema import BOUND, OURS
from opcd_fast.loss.chunks import loop as chunks
from opcd_fast.loss.chunks.workspace import pitch_of

ORDER = (BOUND, *OURS, "trl", "liger-fused")  # the bound first: every other row says its share of it
LOGIT_ROWS = (256, 512, 640, 768, 1024, 1280, 1536, 2048)
GRADIENT_ROWS = (640, 1280, 1920, 2560, 3200, 3840, 4224)


def run(session: Session) -> None:
    device = session.device
    main = [case for case in cases(device, session.dry) if case.group in ("main", "quick")]
    for case in main[: 2 if session.dry else 4]:
        inputs = cache(partial(make_inputs, case, device, KLS[0]))
        bound: Values | None = None
        for one in sorted((i for i in implementations(case, device) if i.name in ORDER), key=_place):
            found = time_row(session, f"{case.name}, {one.name}", case, one, inputs, bound)
            bound = found if one.name == BOUND else bound
            if one.ours:
                rows: dict[str, int] = {}
                session.row(f"{case.name}, parts", partial(_parts, one, inputs, device, rows), shape=_shape(case),
                            settings=rows)  # fmt: skip
        inputs.cache_clear()
        release(device)
    v = 1000 if session.dry else 151_936
    for d in (64, 128) if session.dry else (1024, 4096):
        for name, measure in (("logits", _logits), ("dH", _hidden), ("dW", _weight)):
            session.row(f"product {name}, D {d}", partial(measure, session, v, d), shape={"V": v, "D": d})


def _place(one: Implementation) -> int:
    return ORDER.index(one.name)


def time_row(
    session: Session,
    name: str,
    case: Case,
    one: Implementation,
    inputs: Callable[[], Inputs],
    bound: Values | None,
    seconds: float = 1.5,
    **settings: str,
) -> Values | None:
    """Time, peak memory and share of the bound of one implementation in one case."""

    def measure() -> Values:
        if one.skip:
            raise Skip(one.skip)
        call = one.build(inputs())
        call()  # compiles, and makes handles
        start = time.perf_counter()
        _, peak, _ = with_peak(call, session.device)
        found = timed(call, session.device, seconds, slow=time.perf_counter() - start > SLOW)
        values = times(found)
        if bound is not None and bound["time"].value:
            values["of_bound"] = value(bound["time"].value / found.median, "1")
        if peak is not None and one.is_loss:
            values["peak"] = value(peak, "bytes")
        return values

    settings = {"dtype": case.dtype_name, "head": "frozen" if case.frozen else "trained", **settings}
    return session.row(name, measure, shape=_shape(case), settings=settings, needs=4)


def _shape(case: Case) -> dict[str, int]:
    return {"N": case.N, "V": case.V, "D": case.D}


def _parts(one: Implementation, inputs: Callable[[], Inputs], device: torch.device, rows: dict[str, int]) -> Values:
    """rows: gets what the planner chose."""
    make = chunks.make_plan

    def noted(*arguments: Any, **options: Any) -> Any:
        plan = make(*arguments, **options)
        rows.update(logit_rows=plan.logit_rows, gradient_rows=plan.gradient_rows)
        return plan

    chunks.make_plan = noted
    try:
        return profiled(one.build(inputs()), device)
    finally:
        chunks.make_plan = make


# --- products of the rows that a chunk can have: TFLOP/s ----------------------------------------------------


def _rates(
    session: Session, v: int, d: int, rows: tuple[int, ...], build: Callable[[int], Callable[[], Any]]
) -> Values:
    values: Values = {}
    for count in (8, 16) if session.dry else rows:
        found = timed(build(count), session.device, 0.15)
        values[f"{count}"] = value(2 * count * v * d / found.median / 1e9, "TFLOP/s")
    return values


def _random(session: Session, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=session.device, dtype=torch.bfloat16)


def _float32(session: Session, function: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
    """As loss/chunks/loop.py calls it; a CPU has no product with another output type."""
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

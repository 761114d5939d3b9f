"""dL/dh and dL/dW against float64 at mean KLs from 1 down to 3e-5, ours beside peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch

from benchmarks.gpu.session import Session, Skip, Values, Wrong
from benchmarks.loss_cases import Case, Inputs, cases, make_inputs, oracle
from benchmarks.loss_implementations import Implementation, implementations
from benchmarks.loss_table import gradient_errors
from benchmarks.phase_rows import value
from benchmarks.schema import GradientError

WANTED = ("opcd_fast-triton", "opcd_fast-torch", "trl", "liger-fused")
BOUND = 3e-3  # ours; rounding of the gradient to bf16 alone is 1.7e-3


def run(session: Session) -> None:
    case = next(c for c in cases(session.device, session.dry) if c.group == "accuracy")
    prepared = cache(partial(_prepared, case, session.device))  # of the last KL asked for, once for all contenders
    for mean_kl in case.kls:
        prepared.cache_clear()
        for one in (i for i in implementations(case, session.device) if i.name in WANTED):
            session.row(
                f"{one.name}, KL {mean_kl:g}", partial(_measure, one, case, mean_kl, prepared),
                shape={"N": case.N, "V": case.V, "D": case.D}, settings={"dtype": case.dtype_name},
            )  # fmt: skip


Prepared = tuple[Inputs, torch.Tensor, list[torch.Tensor], float]  # with rows, exact gradients and mean KL


def _prepared(case: Case, device: torch.device, mean_kl: float) -> Prepared:
    inputs = make_inputs(case, device, mean_kl)
    kl, *exact = oracle(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t, weight=not case.frozen)
    references = [gradient.div_(case.N) for gradient in exact if gradient is not None]
    return inputs, torch.arange(case.N, device=device), references, float(kl.mean())


def _measure(one: Implementation, case: Case, mean_kl: float, prepared: Callable[[float], Prepared]) -> Values:
    if one.skip:
        raise Skip(one.skip)
    inputs, index, references, found_kl = prepared(mean_kl)
    errors = gradient_errors(one.build(inputs)(), references, index, found_kl)
    values = {_name(error): value(float("nan") if error.relative_error is None else error.relative_error, "1")
              for error in errors}  # fmt: skip
    values["mean_kl"] = value(found_kl, "nats")
    bad = [e for e in errors if e.relative_error is None or e.relative_error > BOUND]
    if one.ours and bad:
        raise Wrong(f"{_name(bad[0])} is off by {bad[0].relative_error}; at most {BOUND}", values)
    return values


def _name(error: GradientError) -> str:
    return {"hidden": "dL/dh", "weight": "dL/dW"}[error.of]

"""dL/dh and dL/dW against float64 at mean KLs from 1 down to 3e-5, ours beside peers."""

from __future__ import annotations

from benchmarks import loss
from benchmarks.loss_cases import cases
from benchmarks.session import Session

WANTED = ("opcd_fast-triton", "opcd_fast-torch", "trl", "liger-fused")


def run(session: Session) -> None:
    for case in cases(session.device, session.dry):
        if case.group == "accuracy":
            loss.measure(session, case, only=WANTED, needs=1)

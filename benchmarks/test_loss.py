"""The implementations of the loss side by side, one pytest-benchmark group per case.

Groups are called after what their case is for: `main` (frozen and full, float32 and bf16), `N`, `V`, `D` and
`workspace` (the chunk size); `-k group_N` runs those of one kind.

pytest-benchmark times one implementation after the other. That shows a change of our own code from run to run
(`--benchmark-autosave`, `--benchmark-compare`); to compare implementations, prefer `benchmarks.loss_table`,
which interleaves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.loss_cases import Case, Inputs, cases, make_inputs, oracle, oracle_rows, small_cases
from benchmarks.loss_implementations import Implementation, forget_compiled, implementations
from benchmarks.measure import Failure, attempt, release, with_peak
from benchmarks.schema import BOUND, GradientError, Report, Row, Time

MEAN_KL = 1e-3
ROUNDS = 5
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cases() -> list[Case]:
    chosen = cases(_DEVICE, quick=False) if _DEVICE.type == "cuda" else small_cases()
    return [case for case in chosen if case.timed]


_PARAMETERS = [
    pytest.param(case, contender, id=f"group_{case.group}-{case.name}-{contender.name}")
    for case in _cases()
    for contender in implementations(case, _DEVICE)
]


@dataclass
class Prepared:
    case: Case
    inputs: Inputs
    rows: torch.Tensor  # the oracle's
    reference: torch.Tensor  # d(mean KL)/dh of those rows
    mean_kl: float


@pytest.fixture(scope="module")  # one set of inputs per case, freed before the next: two may not fit a GPU
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    case: Case = request.param
    forget_compiled()
    inputs = make_inputs(case, _DEVICE, MEAN_KL)
    rows = oracle_rows(inputs.h_s)
    kl, reference, _ = oracle(inputs.h_s[rows], inputs.w_s, inputs.h_t[rows], inputs.w_t)
    assert reference is not None
    yield Prepared(case, inputs, rows, reference / case.N, float(kl.mean()))
    del inputs
    release(_DEVICE)


@pytest.mark.parametrize(("prepared", "contender"), _PARAMETERS, indirect=["prepared"])
def test_forward_and_backward(
    prepared: Prepared, contender: Implementation, benchmark: Any, report: Report | None
) -> None:
    case = prepared.case
    if contender.skip:
        pytest.skip(contender.skip)
    benchmark.group = f"{case.group}: {case.name}"
    call = contender.build(prepared.inputs)
    outcome = attempt(call, _DEVICE) if contender.compiles else None
    if not isinstance(outcome, Failure):
        outcome = attempt(lambda: with_peak(call, _DEVICE), _DEVICE)
    if isinstance(outcome, Failure):
        if outcome.status == "out of memory" and not contender.ours:
            pytest.skip(outcome.note)
        pytest.fail(outcome.note)
    (dh, *_), peak, reason = outcome
    del _, outcome
    row = Row(
        case.name, contender.name, case.N, case.V, case.D, case.dtype_name, case.frozen,
        exact=contender.exact, group=case.group, workspace_bytes=case.workspace_bytes if contender.ours else None,
        peak_bytes=peak, note=reason,
    )  # fmt: skip
    if contender.is_loss:
        error = float((dh[prepared.rows].double() - prepared.reference).norm() / prepared.reference.norm())
        row.gradient_error.append(GradientError(prepared.mean_kl, error, len(prepared.rows)))
        benchmark.extra_info.update(gradient_error=error, mean_kl=prepared.mean_kl)
        assert not contender.exact or error <= 3e-3
    elif _DEVICE.type == "cpu":
        row.peak_bytes, row.note = None, "no peak: its buffers are made beforehand"
    benchmark.extra_info.update(peak_bytes=row.peak_bytes, exact=contender.exact)
    del dh

    def timed() -> None:
        call()
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    if report is not None and benchmark.stats is not None:
        stats = benchmark.stats.stats
        row.time_ms = Time(1e3 * stats.median, 1e3 * stats.min, 1e3 * stats.max, ROUNDS)
        report.rows.append(row)
        if contender.name == BOUND:  # the last of its case
            for other in report.rows:
                if other.case == case.name and other.time_ms is not None:
                    other.bound_fraction = row.time_ms.median / other.time_ms.median

"""The implementations of the loss, one pytest-benchmark group per case; `-k opcd_fast` runs ours alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.loss import Prepared, contenders
from benchmarks.loss_cases import Case, cases, small_cases
from benchmarks.measure import release
from benchmarks.schema import BOUND, Row

CASES = [case for case in cases(DEVICE, quick=False) if case.timed] if DEVICE.type == "cuda" else small_cases()
NAMES = [(case, one.name) for case in CASES for one in contenders(case, DEVICE, partial(Prepared, case, DEVICE))]


@pytest.fixture(scope="module")  # one set of inputs per case, freed before the next: two may not fit a GPU
def prepared(request: pytest.FixtureRequest) -> Iterator[tuple[Case, Callable[[], Prepared]]]:
    made = cache(lambda: Prepared(request.param, DEVICE))
    yield request.param, made
    made.cache_clear()
    release(DEVICE)


@pytest.mark.parametrize(("prepared", "name"), NAMES, ids=lambda x: getattr(x, "name", x), indirect=["prepared"])
def test_forward_and_backward(
    prepared: tuple[Case, Callable[[], Prepared]], name: str, follow: Callable[..., Row]
) -> None:
    case, made = prepared
    (one,) = (found for found in contenders(case, DEVICE, made) if found.name == name)
    row = follow(f"{case.group}: {case.name}", one, rounds=5)
    assert name == BOUND or "gradient" in row.settings or (row.get("dL/dh") or 0) <= 3e-3

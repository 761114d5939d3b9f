"""`pytest benchmarks/ --benchmark-only` follows our own code from commit to commit (`--benchmark-autosave`,
`--benchmark-compare`): a group for each case; `-k opcd_fast` runs ours alone.

Small cases on a CPU. To compare implementations, prefer `python -m benchmarks`, which interleaves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loss, loss_cases, teacher, teacher_cases
from benchmarks.measure import release, wait
from benchmarks.models import SHAPES, random_model
from benchmarks.schema import BOUND
from benchmarks.session import Contender, Session

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = (torch.float32, torch.bfloat16)
WAYS = ("opcd_fast-merge", "opcd_fast-merge-rebuilt", "opcd_fast-pad", "concat", "transformers-cache",
        "transformers-cache-rebuilt", BOUND)  # fmt: skip
SMALL = [loss_cases.Case("small", 128, 8192, 256, dtype, frozen) for dtype in DTYPES for frozen in (False, True)]
LOSSES = [case for case in loss_cases.cases(DEVICE, dry=False) if case.timed] if ON_GPU else SMALL
TEACHERS = [teacher_cases.Case(*sizes) for sizes in ([(8192, 512, 8), (2048, 512, 8)] if ON_GPU
                                                     else [(256, 16, 8), (64, 16, 8)])]  # fmt: skip


@cache
def model() -> Any:
    if ON_GPU:
        return teacher_cases.make_model(DEVICE, dry=False, layers=4)[0]
    return random_model(replace(SHAPES["SmolLM2-135M"], layers=6, vocabulary=1024), torch.float32, DEVICE)


def losses(case: loss_cases.Case) -> list[Contender]:
    return loss.contenders(case, DEVICE, cache(lambda: loss.Prepared(case, DEVICE)))


def ways(case: teacher_cases.Case) -> list[Contender]:
    setting = teacher_cases.make_setting(model(), case)
    return teacher.contenders(setting, teacher_cases.reference(setting))


CASES = {f"{case.group}: {case.name}": partial(losses, case) for case in LOSSES}
CASES |= {f"teacher: {case.name}": partial(ways, case) for case in TEACHERS}
NAMES = [(name, one.name) for name, case in CASES.items() if case.func is losses for one in case()]
NAMES += [(name, way) for name, case in CASES.items() if case.func is ways for way in WAYS]


@pytest.fixture(scope="module")  # one set of inputs per case, freed before the next: two may not fit a GPU
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Contender]]]:
    yield request.param, {one.name: one for one in CASES[request.param]()}
    release(DEVICE)


@pytest.mark.parametrize(("case", "name"), NAMES, indirect=["case"])
def test_speed(case: tuple[str, dict[str, Contender]], name: str, benchmark: Any, tmp_path: Path) -> None:
    """Measured as the tables do it, what is wrong being a failure; then timed by pytest-benchmark."""
    group, one = case[0], case[1][name]
    row = Session("pytest", tmp_path / "row.jsonl", device=DEVICE).compare(
        group, [one], shape={}, settings={}, seconds=None)[name]  # fmt: skip
    if row.status == "skipped" or (row.status == "out of memory" and not one.ours):
        pytest.skip(row.note or "")
    assert row.status == "ok", row.note
    assert (row.get("max_error") or 0.0) <= (0.5 if ON_GPU else 1e-4)
    benchmark.group = group
    benchmark.extra_info.update({what: found.value for what, found in row.values.items()})
    call = one.build()
    benchmark.pedantic(lambda: (call(), wait(DEVICE)), rounds=3, iterations=1, warmup_rounds=1)

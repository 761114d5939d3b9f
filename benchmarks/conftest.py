"""`pytest benchmarks/ --benchmark-only`: follows our own code from commit to commit (`--benchmark-autosave`,
`--benchmark-compare`). To compare implementations, prefer `python -m benchmarks`, which interleaves them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.schema import Row
from benchmarks.session import Contender, Session

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures CPU memory is talkative


@pytest.fixture
def follow(benchmark: Any, tmp_path: Path) -> Callable[..., Row]:
    """Measure one contender of a case as the tables do, then let pytest-benchmark time it."""

    def measure(case: str, one: Contender, rounds: int) -> Row:
        session = Session("pytest", tmp_path / "row.jsonl", device=DEVICE)
        row = session.compare(case, [one], shape={}, settings={}, seconds=None)[one.name]
        if row.status == "skipped" or (row.status == "out of memory" and not one.ours):
            pytest.skip(row.note or "")
        assert row.status == "ok", row.note
        benchmark.group = case
        benchmark.extra_info.update({name: found.value for name, found in row.values.items()})
        call = one.build()

        def timed() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=1)
        return row

    return measure

"""The tests marked `gpu`, a row each. Those that compile for seconds run last (tests/gpu/conftest.py)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.environment import ROOT
from benchmarks.schema import BROKEN, Row, Values, read, value
from benchmarks.session import Session, Wrong

SECONDS = 20  # of one test
KERNELS = ("gpu/test_loss_gpu", "gpu/test_attention_gpu")  # in smoke, but for what is compiled for seconds
COMPILED = "flex or compile or 3.0"  # in a test's name
OTHERS = (
    "gpu/test_teacher_gpu", "gpu/test_trainer_gpu", "gpu/test_memory_gpu", "gpu/test_shared_prompts_gpu",
    "teacher/test_offload",
)  # fmt: skip


def run(session: Session) -> None:
    rows_of(session, (*KERNELS, *OTHERS))


def rows_of(session: Session, files: Sequence[str], chosen: str = "") -> None:
    """A row for every test in these files of tests/ that has none yet, in any phase; `chosen` by their names (-k)."""
    arguments = ["-m", "gpu and not slow", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-k", chosen,
                 *(str(ROOT / "tests" / f"{name}.py") for name in files)]  # fmt: skip
    if importlib.util.find_spec("pytest_timeout"):
        arguments += ["-o", f"timeout={SECONDS}", "-o", "timeout_method=signal"]
    if session.dry:
        arguments.append("--collect-only")
    session.row(" ".join(filter(None, ["pytest", chosen])), lambda: _pytest(session, arguments))


def _pytest(session: Session, arguments: list[str]) -> Values:
    rows = RowsOfTests(session)
    status = int(pytest.main(["--rootdir", str(ROOT), *arguments], plugins=[rows]))
    values = {"passed": value(rows.passed, "1"), "collected": value(rows.collected, "1")}
    if rows.uncollected:
        raise Wrong(f"not collected: {', '.join(rows.uncollected)}", values)
    if status not in (0, 1, int(pytest.ExitCode.NO_TESTS_COLLECTED)) or not rows.collected:
        raise Wrong(f"pytest ended with status {status}", values)
    return values


class RowsOfTests:
    """A row for every test as soon as it has run. One that breaks the CUDA context ends the process, as one does that
    crashes it, and the next process goes on behind it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.passed = self.collected = 0
        self.uncollected: list[str] = []

    @pytest.hookimpl(trylast=True)  # after -m
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.collected = len(items)
        done = {row.case for row in read(self.session.out).rows}
        items[:] = [item for item in items if _name(item.nodeid) not in done]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.uncollected.append(report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.session.mark(_name(nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and (report.when != "setup" or report.passed):
            return
        self.passed += report.passed
        self.session.write(Row(self.session.table, _name(report.nodeid), note=_reason(report),
                               status="ok" if report.passed else report.outcome,
                               values={"time": value(1e3 * report.duration, "ms")}))  # fmt: skip
        if report.failed and self.session.broken():
            os._exit(BROKEN)


def _name(nodeid: str) -> str:
    return nodeid.removeprefix("tests/")


def _reason(report: Any) -> str | None:
    if report.passed:
        return None
    if isinstance(report.longrepr, tuple):  # a skip: file, line, why
        return str(report.longrepr[2])
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return " ".join((lines or str(report.longrepr).splitlines()[-1:])[0].split())[:400]

"""`pytest benchmarks/ --benchmark-only`: real shapes on a GPU, small ones on a CPU, in a few minutes there.

`--report DIR` also writes the results in this repository's schema.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks import environment
from benchmarks.schema import Report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, default=None, metavar="DIR", help="write the results there")


def pytest_configure() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures CPU memory is talkative


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest, device: torch.device):
    directory: Path | None = request.config.getoption("--report")
    if directory is None:
        yield None
        return
    started: Report = environment.start_report(
        "loss-pytest", "pytest benchmarks/ --benchmark-only --report DIR", device, []
    )
    yield started
    started.complete = True
    started.write(directory / started.file_name())

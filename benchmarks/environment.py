"""Where and with what a benchmark ran: the head of every table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import opcd_fast
from benchmarks.measure import wait
from benchmarks.schema import Device

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "opcd_fast": opcd_fast.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state() -> tuple[str | None, bool | None]:
    """(commit, whether the tree differs from it). A copy of the tree without its history names its commit in
    OPCD_GIT_COMMIT; then nobody knows whether it was clean."""
    named = os.environ.get("OPCD_GIT_COMMIT")
    if named:
        return named, None
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if commit is None:
        return None, None
    return commit, _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") != ""


def describe(device: torch.device, ceilings: bool = True) -> Device:
    """ceilings: measure a large product and a large copy too, which takes seconds."""
    if device.type != "cuda":
        return Device("cpu", _cpu_name(), torch.get_num_threads())
    properties = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Device(
        kind="cuda",
        name=properties.name,
        count_of_processors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        driver=driver.splitlines()[0] if driver else None,
        cuda=torch.version.cuda,
        matmul_flops_per_second=matmul_ceiling(device) if ceilings else None,
        copy_bytes_per_second=copy_ceiling(device) if ceilings else None,
    )


def matmul_ceiling(device: torch.device, size: int = 8192) -> float:
    """FLOP/s of a square product of that size, bf16."""
    # Random data: a matrix unit fed zeros draws less power and runs faster than it ever will in use.
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def copy_ceiling(device: torch.device, size: int = 1 << 31) -> float:
    """Bytes read plus written in a second, copying that many bytes."""
    source = torch.empty(size, device=device, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Mean of ten calls in a row, after three."""
    for _ in range(3):
        call()
    wait(device)
    start = time.perf_counter()
    for _ in range(10):
        call()
    wait(device)
    return (time.perf_counter() - start) / 10


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

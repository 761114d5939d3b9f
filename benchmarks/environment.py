"""Where and with what a benchmark ran: the head of every table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import opcd_fast
from benchmarks.schema import Device, Head

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel")
VARIABLES = (
    "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CUDNN_SDPA_DEPRIORITIZED", "TRITON_INTERPRET", "OPCD_LAUNCH_SHAPES",
    "OMP_NUM_THREADS",
)  # fmt: skip


def head(table: str, device: torch.device, command: str, notes: list[str]) -> Head:
    commit, dirty = git_state()
    set_here = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Head(table, now, command, commit, dirty, describe(device), versions(), set_here, notes)


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
    commit = output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if commit is None:
        return None, None
    return commit, output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") != ""


def describe(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device("cpu", _cpu_name(), torch.get_num_threads())
    found = torch.cuda.get_device_properties(device)
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Device("cuda", found.name, found.multi_processor_count, found.total_memory,
                  driver.splitlines()[0] if driver else None, torch.version.cuda)  # fmt: skip


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""What this machine is and the most it can do: every other number is read beside these."""

from __future__ import annotations

import shutil
import subprocess
import time

import torch

from benchmarks import environment
from benchmarks.measure import timed, wait
from benchmarks.schema import Values, value
from benchmarks.session import Session


def run(session: Session) -> None:
    size, copied = (256, 1 << 20) if session.dry else (8192, 1 << 31)
    texts: dict[str, str] = {}
    session.row("versions", lambda: _versions(session, texts), settings=texts)
    session.row("copy", lambda: _copy(session, copied), shape={"bytes": copied})
    session.row("product", lambda: _product(session, size), shape={"n": size}, settings={"dtype": "bfloat16"})
    session.row("product, float32 out", lambda: _wide_product(session, size), shape={"n": size})
    session.row("host", lambda: _host(session), settings={"call": "add_ of one element"})


def _copy(session: Session, size: int) -> Values:
    rate = environment.copy_ceiling(session.device, size)
    return {"rate": value(rate / 1e12, "TB/s")}


def _product(session: Session, size: int) -> Values:
    rate = environment.matmul_ceiling(session.device, size)
    return {"rate": value(rate / 1e12, "TFLOP/s")}


def _wide_product(session: Session, size: int) -> Values:
    """As the logits are made."""
    session.on_device("a product of bf16 matrices with a float32 result")
    a, b = (torch.randn(size, size, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    found = timed(lambda: torch.mm(a, b, out_dtype=torch.float32), session.device, 1.0)
    return {"rate": value(2 * size**3 / (found.value or 1.0) / 1e9, "TFLOP/s"), "time": found}


def _host(session: Session) -> Values:
    """Microseconds from one call to the next when the device has nothing to do: the pace of decoding."""
    x = torch.zeros(1, device=session.device)
    calls = 200 if session.dry else 20_000
    for _ in range(100):
        x.add_(1.0)
    wait(session.device)
    start = time.perf_counter()
    for _ in range(calls):
        x.add_(1.0)
    wait(session.device)
    return {"call": value(1e6 * (time.perf_counter() - start) / calls, "µs")}


def _versions(session: Session, texts: dict[str, str]) -> Values:
    """Numbers of the device; `texts` gets what is text."""
    texts.update(_texts(session.device))
    session.on_device("its properties")
    found = torch.cuda.get_device_properties(session.device)
    free, total = torch.cuda.mem_get_info(session.device)
    return {
        "multiprocessors": value(found.multi_processor_count, "1"),
        "memory": value(total, "bytes"),
        "free": value(free, "bytes"),
        "L2": value(getattr(found, "L2_cache_size", 0), "bytes"),
    }


def _texts(device: torch.device) -> dict[str, str]:
    found = {"torch": torch.__version__, "cpu_threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    found["nvcc"] = shutil.which("nvcc") or "not on PATH"
    try:
        query = "--query-gpu=clocks.sm,clocks.mem,power.limit,temperature.gpu"
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10, check=True
        )
        found["clocks"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        found["clocks"] = f"nvidia-smi: {type(error).__name__}"
    return found

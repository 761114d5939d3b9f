"""What this machine is and the most it can do: every other number is read beside these."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

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


def _rate(session: Session, call: Callable[[], Any], work: float, unit: str) -> Values:
    """`work` is what one call does, in 1e12 of the unit's things."""
    found = timed(call, session.device, 1.0)
    return {"rate": value(1e3 * work / (found.value or 1.0), unit), "time": found}


def _copy(session: Session, size: int) -> Values:
    """Bytes read plus written in a second."""
    source = torch.empty(size, device=session.device, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return _rate(session, lambda: target.copy_(source), 2 * size / 1e12, "TB/s")


def _matrices(session: Session, size: int) -> list[torch.Tensor]:
    """Random: a matrix unit fed zeros draws less power and runs faster than it ever will in use."""
    return [torch.randn(size, size, device=session.device, dtype=torch.bfloat16) for _ in range(2)]


def _product(session: Session, size: int) -> Values:
    a, b = _matrices(session, size)
    out = torch.empty_like(a)
    return _rate(session, lambda: torch.mm(a, b, out=out), 2 * size**3 / 1e12, "TFLOP/s")


def _wide_product(session: Session, size: int) -> Values:
    """As the logits are made."""
    session.on_device("a product of bf16 matrices with a float32 result")
    a, b = _matrices(session, size)
    return _rate(session, lambda: torch.mm(a, b, out_dtype=torch.float32), 2 * size**3 / 1e12, "TFLOP/s")


def _host(session: Session) -> Values:
    """Microseconds from one call to the next when the device has nothing to do: the pace of decoding."""
    x = torch.zeros(1, device=session.device)
    calls = 200 if session.dry else 20_000

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            x.add_(1.0)
        wait(session.device)
        return time.perf_counter() - start

    seconds(100)
    return {"call": value(1e6 * seconds(calls) / calls, "µs")}


def _versions(session: Session, texts: dict[str, str]) -> Values:
    """Numbers of the device; `texts` gets what is text."""
    texts.update(cpu_threads=str(torch.get_num_threads()), nvcc=shutil.which("nvcc") or "not on PATH")
    session.on_device("its properties")
    found = torch.cuda.get_device_properties(session.device)
    free, total = torch.cuda.mem_get_info(session.device)
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit,temperature.gpu", "--format=csv,noheader"]
    texts.update(cudnn=str(torch.backends.cudnn.version()), capability=f"{found.major}.{found.minor}",
                 clocks=environment.output(*query) or "nvidia-smi does not say")  # fmt: skip
    return {
        "multiprocessors": value(found.multi_processor_count, "1"),
        "memory": value(total, "bytes"),
        "free": value(free, "bytes"),
        "L2": value(getattr(found, "L2_cache_size", 0), "bytes"),
    }

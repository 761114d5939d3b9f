"""Where a call's time goes on the device, kernel by kernel, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import wait
from benchmarks.schema import Values, value

PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = ("flash", "fmha", "attention", "sdpa")
OURS = ("_rows_kernel", "_terms_kernel", "_normaliser_kernel", "_merge_attention_kernel", "opcd")
MOST = 12  # kernels named


def profiled(call: Callable[[], Any], device: torch.device) -> Values:
    """Milliseconds of one call after one that warms up, by kind and by kernel; on a CPU by operator."""
    call()
    wait(device)
    with profiler(device) as found:
        call()
        wait(device)
    return summed(found, device)


def profiler(device: torch.device) -> Any:
    kind = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kind.CUDA if device.type == "cuda" else kind.CPU])


def summed(found: Any, device: torch.device) -> Values:
    times: dict[str, tuple[float, int]] = {}
    for event in found.key_averages():
        if device.type == "cuda":
            # What ran on the device, not the host's calls that started it.
            if "CUDA" not in str(getattr(event, "device_type", "")):
                continue
            micros = getattr(event, "self_device_time_total", 0.0) or getattr(event, "self_cuda_time_total", 0.0)
        else:
            micros = event.self_cpu_time_total
        before = times.get(event.key, (0.0, 0))
        times[event.key] = before[0] + micros / 1e3, before[1] + event.count
    if not times:
        raise RuntimeError("the profiler saw no kernel")
    kinds: dict[str, float] = {}
    for name, (ms, _) in times.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + ms
    values = {kind: value(ms, "ms") for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])}
    values["launches"] = value(sum(count for _, count in times.values()), "1")
    for name, (ms, count) in sorted(times.items(), key=lambda item: -item[1][0])[:MOST]:
        values[f"{count} x {name[:90]}"] = value(ms, "ms")
    return values


def kind_of(name: str) -> str:
    lower = name.lower()
    if any(part in lower for part in OURS):
        return "our kernels"
    if any(part in lower for part in ATTENTION):
        return "attention"
    if any(part in lower for part in PRODUCTS):
        return "products"
    return "copies" if "memcpy" in lower or "memset" in lower else "other"

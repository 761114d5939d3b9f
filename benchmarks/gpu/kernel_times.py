"""Where a call's time goes on the device, kernel by kernel, from torch's profiler; on a CPU operator by operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import wait
from benchmarks.schema import Values, value

KINDS = {  # of kernels, by parts of their names; the first that fits
    "our kernels": ("_rows_kernel", "_terms_kernel", "_normaliser_kernel", "_variation_kernel", "_statistics_kernel",
                    "_merge_attention_kernel", "opcd"),  # fmt: skip
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "aten::mm", "aten::addmm", "aten::bmm"),
    "copies": ("memcpy", "memset"),
}
MOST = 12  # kernels named


def profiled(call: Callable[[], Any], device: torch.device) -> Values:
    """Milliseconds of one call after one that warms up, by kind and by kernel."""
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
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for event in found.key_averages():
        if device.type != "cuda":
            micros = event.self_cpu_time_total
        elif "CUDA" in str(event.device_type):  # what ran on the device, not the host's calls that started it
            micros = event.self_device_time_total
        else:
            continue
        times[event.key] += micros / 1e3
        counts[event.key] += event.count
        kinds[kind_of(event.key)] += micros / 1e3
    if not times:
        raise RuntimeError("the profiler saw no kernel")
    values = {kind: value(ms, "ms") for kind, ms in kinds.most_common()}
    values["launches"] = value(counts.total(), "1")
    return values | {f"{counts[name]} x {name[:90]}": value(ms, "ms") for name, ms in times.most_common(MOST)}


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "other")

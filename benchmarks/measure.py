"""Time and peak memory of several calls that do the same work.

Interleaved: every round runs each contender once, so that a neighbour's load, the clocks or the temperature
meet all of them alike. Medians, because one disturbed round must not move the result.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.schema import Time

SLOW = 1.0  # seconds of a call that `timed` makes once


@dataclass
class Failure:
    status: str  # a status of the schema
    note: str


def attempt(call: Callable[[], Any], device: torch.device) -> Any:
    """What the call returns, or a `Failure`: a contender that runs out of memory must not end the table."""
    try:
        result = call()
        wait(device)
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError, and the CPU's allocator raises a plain one.
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        out = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
        failure = Failure("out of memory" if out else "failed", f"{type(error).__name__}: {text}"[:300])
    except Exception as error:
        # A kernel that does not compile, an argument that a version does not know: a row, not the end.
        failure = Failure("failed", f"{type(error).__name__}: {error}"[:300])
    else:
        return result
    # After the handler, so that the traceback's frames no longer hold the tensors that did not fit. A device
    # that a kernel has broken fails again here; what comes after it will say so in its own rows.
    with contextlib.suppress(RuntimeError):
        release(device)
    return failure


def release(device: torch.device) -> None:
    """Give cached memory back, so that one contender's leftovers do not count against the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_interleaved(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 20,
    warm: bool = False,
    untimed: bool = True,
    at_most: Mapping[str, int] | None = None,
) -> dict[str, Time | Failure]:
    """Time of one call of each, from as many rounds as fit in `seconds` (at least min_rounds).

    On a GPU, between CUDA events; each timed call follows an untimed one of the same contender, which
    compiles kernels and lets the allocator settle after the contender before, unless calls are so long that this
    does not matter (`untimed` false). On a CPU with perf_counter, after
    one untimed round unless every contender has run already (`warm`). A contender that fails leaves the rounds, and so
    does one that was timed as often as `at_most` says, because it is too slow for more.
    """
    limits = at_most or {}
    results: dict[str, Time | Failure] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    if not warm and device.type != "cuda":
        _round(calls, device, results, None, untimed)
        start = time.perf_counter()
    for done in range(max_rounds):
        each = (time.perf_counter() - start) / max(done, 1)
        if done >= min_rounds and time.perf_counter() - start + each > seconds:
            break
        left = {n: call for n, call in calls.items() if done < limits.get(n, max_rounds)}
        _round(left, device, results, samples, untimed)
    for name, values in samples.items():
        if name not in results and values:
            results[name] = Time(statistics.median(values), min(values), max(values), len(values))
    return results


def timed(call: Callable[[], Any], device: torch.device, seconds: float, slow: bool = False) -> Time:
    """One contender alone: three calls at least, one if they are slow. Raises RuntimeError where it fails."""
    rounds: dict[str, Any] = {"min_rounds": 1, "max_rounds": 1, "untimed": False} if slow else {}
    found = time_interleaved({"": call}, device, seconds=seconds, warm=True, **rounds)[""]
    if isinstance(found, Failure):
        raise RuntimeError(found.note)
    return found


def _round(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    results: dict[str, Time | Failure],
    samples: dict[str, list[float]] | None,
    untimed: bool,
) -> None:
    for name, call in calls.items():
        if name in results:
            continue
        if device.type == "cuda" and torch.cuda.memory_reserved() > 0.7 * _memory(device):
            # Otherwise the allocator would give back and take memory again inside somebody's timed call.
            release(device)
        outcome: Any = None
        if samples is None or (untimed and device.type == "cuda"):
            outcome = attempt(call, device)
        if samples is not None and not isinstance(outcome, Failure):
            outcome = None  # frees the untimed call's gradients before the timed one
            outcome = attempt(partial(_one, call, device), device)
        if isinstance(outcome, Failure):
            results[name] = outcome
        elif samples is not None:
            samples[name].append(outcome)


def _one(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        result = call()
        last.record()
        last.synchronize()
        del result
        return first.elapsed_time(last)
    begin = time.perf_counter()
    result = call()
    end = time.perf_counter()
    del result  # not before the clock is read: freeing the gradients is not part of the call
    return 1e3 * (end - begin)


def with_peak(call: Callable[[], Any], device: torch.device) -> tuple[Any, int | None, str | None]:
    """(result, peak bytes allocated above what was there before, why there is no peak).

    On a GPU the allocator's own maximum. On a CPU the sum of torch's allocation events, which the profiler
    records; it sees the scratch of operators as well, but not what a library takes past torch's allocator.
    """
    if device.type == "cuda":
        release(device)
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        result = call()
        wait(device)
        return result, torch.cuda.max_memory_allocated() - base, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        result = call()
    try:
        events = run.profiler.kineto_results.events()
        moved = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    except AttributeError:
        return result, None, "this torch's profiler does not hand out its allocation events"
    live = peak = 0
    for _, size in sorted(moved, key=lambda event: event[0]):
        live += size
        peak = max(peak, live)
    return result, peak, None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory

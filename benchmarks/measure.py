"""Time and peak memory of several calls that do the same work.

Interleaved: every round runs each contender once, so that a neighbour's load, the clocks or the temperature
meet all of them alike. Medians, because one disturbed round must not move the result.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.schema import Value

Sample = Callable[[], "Sequence[float] | None"]  # milliseconds of one call or of several; None: it failed


def release(device: torch.device) -> None:
    """Give cached memory back, so that one contender's leftovers do not count against the next. A CPU keeps none."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved(
    samples: Mapping[str, Sample],
    *,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 20,
    at_most: Mapping[str, int] | None = None,
    left: float = float("inf"),
) -> dict[str, Value]:
    """Milliseconds of each, from as many rounds as fit in `seconds`: at least min_rounds, or one where no more than
    that fits into what is `left` of everything.

    A contender that fails leaves the rounds; so does one that was taken as often as `at_most` says, because it is too
    slow for more. What was never taken is not in the result.
    """
    limits = at_most or {}
    failed: set[str] = set()
    taken: dict[str, list[float]] = {name: [] for name in samples}
    start = time.perf_counter()
    for done in range(max_rounds):
        elapsed = time.perf_counter() - start
        after = elapsed + elapsed / max(done, 1)
        if done and after > left or done >= min_rounds and after > seconds:
            break
        for name, sample in samples.items():
            if name in failed or done >= limits.get(name, max_rounds):
                continue
            milliseconds = sample()
            if milliseconds is None:
                failed.add(name)
            else:
                taken[name] += milliseconds
    return {name: spread(found) for name, found in taken.items() if found}


def spread(milliseconds: Sequence[float]) -> Value:
    return Value(statistics.median(milliseconds), "ms", min(milliseconds), max(milliseconds), len(milliseconds))


def timed(call: Callable[[], Any], device: torch.device, seconds: float) -> Value:
    """One contender alone, at least three calls. Raises what it raises."""
    return interleaved({"it": lambda: [clocked(call, device)]}, seconds=seconds)["it"]


def clocked(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call: on a CPU by perf_counter, on a GPU between events.

    There the timed call follows an untimed one, which lets the allocator settle after the contender before.
    """
    if device.type == "cuda":
        if torch.cuda.memory_reserved() > 0.7 * torch.cuda.get_device_properties(device).total_memory:
            # Otherwise the allocator would give back and take memory again inside somebody's timed call.
            release(device)
        call()
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


def with_peak(call: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """(result, peak bytes allocated above what was there before).

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
        return result, torch.cuda.max_memory_allocated() - base
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        result = call()
    events = run.profiler.kineto_results.events()
    live = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return result, peak

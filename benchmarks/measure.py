"""Time and peak memory of several calls that do the same work.

Interleaved: every round runs each contender once, so that a neighbour's load, the clocks or the temperature
meet all of them alike. Medians, because one disturbed round must not move the result.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.schema import Value


@dataclass
class Failure:
    status: str  # a status of the schema
    note: str


Sample = Callable[[], "Sequence[float] | Failure"]  # milliseconds of one call or of several


def attempt(call: Callable[[], Any], device: torch.device) -> Any:
    """What the call returns, or a `Failure`: a contender that runs out of memory must not end the table."""
    try:
        result = call()
        wait(device)
    except Exception as error:  # noqa: BLE001 - a kernel that does not compile is a row, not the end
        text = " ".join(str(error).split()) or type(error).__name__
        out = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
        failure = Failure("out of memory" if out else "failed", f"{type(error).__name__}: {text}"[:400])
    else:
        return result
    # After the handler, so that the traceback's frames no longer hold the tensors that did not fit. A device
    # that a kernel has broken fails again here; what comes after it will say so in its own rows.
    with contextlib.suppress(RuntimeError):
        release(device)
    return failure


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
) -> dict[str, Value | Failure]:
    """Milliseconds of each, from as many rounds as fit in `seconds`: at least min_rounds, or one where no more than
    that fits into what is `left` of everything.

    A contender that fails leaves the rounds; so does one that was taken as often as `at_most` says, because it is too
    slow for more.
    """
    limits = at_most or {}
    failed: dict[str, Failure] = {}
    taken: dict[str, list[float]] = {name: [] for name in samples}
    start = time.perf_counter()
    for done in range(max_rounds):
        each = (time.perf_counter() - start) / max(done, 1)
        after = time.perf_counter() - start + each
        if done and after > left or done >= min_rounds and after > seconds:
            break
        for name, sample in samples.items():
            if name in failed or done >= limits.get(name, max_rounds):
                continue
            outcome = sample()
            if isinstance(outcome, Failure):
                failed[name] = outcome
            else:
                taken[name] += outcome
    return {**{name: spread(found) for name, found in taken.items() if found}, **failed}


def spread(milliseconds: Sequence[float]) -> Value:
    return Value(statistics.median(milliseconds), "ms", min(milliseconds), max(milliseconds), len(milliseconds))


def timed(call: Callable[[], Any], device: torch.device, seconds: float) -> Value:
    """One contender alone, at least three calls. Raises RuntimeError where it fails."""
    found = interleaved({"": in_process(call, device)}, seconds=seconds)[""]
    if isinstance(found, Failure):
        raise RuntimeError(found.note)
    return found


def in_process(call: Callable[[], Any], device: torch.device, *, untimed: bool = True) -> Sample:
    """One call in this process: on a CPU with perf_counter, on a GPU between events.

    There each timed call follows an untimed one of the same contender, which lets the allocator settle after the
    contender before, unless calls are so long that this does not matter (`untimed` false).
    """

    def sample() -> Sequence[float] | Failure:
        if device.type == "cuda":
            if torch.cuda.memory_reserved() > 0.7 * torch.cuda.get_device_properties(device).total_memory:
                # Otherwise the allocator would give back and take memory again inside somebody's timed call.
                release(device)
            outcome = attempt(call, device) if untimed else None
            if isinstance(outcome, Failure):
                return outcome
            outcome = None  # frees the untimed call's gradients before the timed one
        outcome = attempt(partial(_one, call, device), device)
        return outcome if isinstance(outcome, Failure) else [outcome]

    return sample


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

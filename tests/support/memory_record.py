"""What the CPU's allocator held, moment by moment, in one step of a real run."""

import gc
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile, record_function

from opcd_fast.runtime import timing

MB = 1 << 20


def peak_bytes(function):
    """Most bytes held at once by tensors and temporaries that were allocated while the function ran."""
    gc.collect()  # what an earlier profile saw would count when it is freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


@contextmanager
def marked_parts(monkeypatch):
    """Every part that a stopwatch times leaves a mark in a profile."""
    timed = timing.Stopwatch.__call__

    @contextmanager
    def marking(self, part):
        with record_function(f"PART {part}"), timed(self, part):
            yield

    with monkeypatch.context() as patch:
        patch.setattr(timing.Stopwatch, "__call__", marking)
        yield


def recorded_peaks(make_and_train, monkeypatch):
    """Peak bytes of each part of the second step of the run that `make_and_train` makes from nothing.

    The profiler has to see everything made: it does not know the size of what was there before it, unless another
    profile of this process saw that. Such garbage would count as less than nothing when it is found.
    """
    gc.collect()
    with (
        marked_parts(monkeypatch),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run,
    ):
        make_and_train()
    events = run.profiler.kineto_results.events()
    parts = sorted((e.start_ns(), e.end_ns(), e.name()[5:]) for e in events if e.name().startswith("PART "))
    starts = [start for start, _, name in parts if name == "rollout"]
    step = [part for part in parts if starts[1] <= part[0] < starts[2]]
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peaks, held, place = {name: 0 for _, _, name in step}, 0, 0
    for start, end, name in step:
        while moves[place][0] < start:
            held += moves[place][1]
            place += 1
        peaks[name] = max(peaks[name], held)
        while moves[place][0] <= end:
            held += moves[place][1]
            peaks[name] = max(peaks[name], held)
            place += 1
    return peaks

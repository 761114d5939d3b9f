"""Steps of fixed shapes as CUDA graphs, kept from one call to the next. Not run on a device yet."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_told: set[str] = set()


class CapturedSteps:
    """Runs steps, which take and return nothing, as graphs: one for each shape, recorded once, all in one pool.

    The first step of a shape runs as it is, so that kernels are loaded; the second is recorded. What cannot be recorded
    goes on as it is, which is said once per process: what waits for the device (experts chosen on the host, say) is not
    even tried, for a capture that fails leaves torch's allocator in the middle of it.

    A graph reads and writes where tensors lay when it was recorded. So what a step finds and what it leaves has to lie
    in `places`, by name, whenever a step of that shape is run.
    """

    def __init__(self) -> None:
        self.places: dict[Any, Tensor] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._seen: set[Hashable] = set()
        self._recordable = True

    @property
    def recorded(self) -> bool:
        return bool(self._graphs)

    def __call__(self, shape: Hashable, step: Callable[[], None]) -> None:
        if shape in self._seen and shape not in self._graphs and self._recordable:
            self._record(shape, step)
        if shape in self._graphs:
            self._graphs[shape].replay()
        elif shape in self._seen or not self._recordable:
            step()
        else:
            with _noticed_waits() as waits:
                step()
            if waits:
                self._give_up("a step waits for the device")
        self._seen.add(shape)

    def _record(self, shape: Hashable, step: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
                step()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a step does that a graph cannot hold
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return
        self._graphs[shape] = graph

    def _give_up(self, reason: str) -> None:
        self._recordable = False
        if reason not in _told:
            _told.add(reason)
            _log.warning("steps run without a CUDA graph: %s", reason)


@contextmanager
def _noticed_waits() -> Iterator[list[Any]]:
    """A list that has something in it afterwards if the host waited for the device."""
    found: list[Any] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [one for one in said if "synchronizing" in str(one.message)]


class KeptSteps:
    """Steps of earlier calls, by what they were made for. All such stores of a process keep `most` bytes together."""

    def __init__(self, most: int) -> None:
        self.most, self._reads = most, None
        self.kept: dict[Hashable, tuple[CapturedSteps, int]] = {}  # oldest first
        _stores.add(self)

    def take(self, reads: Any, key: Hashable) -> CapturedSteps:
        """Those of `key`, or new ones; not kept while they are at work, so that an error ends them.

        reads: what every step reads besides its places. When that is another, all that was recorded is forgotten.
        """
        if reads != self._reads:
            self.kept.clear()
            self._reads = reads
        return self.kept.pop(key, (None, 0))[0] or CapturedSteps()

    def keep(self, key: Hashable, steps: CapturedSteps, nbytes: int) -> None:
        if steps.recorded:
            self.kept[key] = steps, nbytes
        while self.kept and sum(size for store in _stores for _, size in store.kept.values()) > self.most:
            del self.kept[next(iter(self.kept))]


_stores: weakref.WeakSet[KeptSteps] = weakref.WeakSet()


def release_steps() -> bool:
    """When memory is short: forget the process's kept steps, and keep none from here on. Whether there were any."""
    found = any(store.kept for store in _stores)
    for store in _stores:
        store.most = 0
        store.kept.clear()
    return found

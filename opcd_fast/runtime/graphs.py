"""Steps of fixed shapes as CUDA graphs. Not run on a device yet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

_log = logging.getLogger(__name__)
_told: set[str] = set()


class CapturedSteps:
    """Runs `step`, which takes and returns nothing, as a graph that is recorded once for each shape.

    The first step of a shape runs as it is, so that kernels are loaded and buffers made; the second is recorded. What
    cannot be recorded (experts chosen on the host, say) goes on as it is, which is said once per process. Shapes come
    one after the other: each graph is recorded in the pool of the one before, which is released then. The last one goes
    with this object, and so does the pool.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._pool = torch.cuda.graph_pool_handle()
        self._shape: Hashable = None
        self._recorded: Hashable = None  # the shape of the graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recordable = True

    def __call__(self, shape: Hashable) -> None:
        if shape == self._shape and shape != self._recorded and self._recordable:
            self._record(shape)
        if shape == self._recorded and self._graph is not None:
            self._graph.replay()
        else:
            self._step()
        self._shape = shape

    def _record(self, shape: Hashable) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._step()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a step does that a graph cannot hold
            self._recordable = False
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if reason not in _told:
                _told.add(reason)
                _log.warning("steps run without a CUDA graph: %s", reason)
            return
        self._graph, self._recorded = graph, shape

"""CUDA graphs on a CPU: operators with the very tensors they were called with, run again by `replay`.

As on a device, what is recorded does not run, and a replay knows nothing but the tensors of that time: one that was
replaced since is read and written where it lay, and numbers of the host are what they were.
"""

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITS = ("_local_scalar_dense", "nonzero", "item")


def tensors_of(*values):
    return [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]


def written_by(func, args, kwargs):
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    given = {a.name: x for a, x in zip(func._schema.arguments, args)} | kwargs
    return tensors_of([x for name, x in given.items() if name in written])


class Graph(TorchDispatchMode):
    recorded = replayed = 0

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(func.overloadpacket.__name__.startswith(one) for one in WAITS):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.before += [(x, x.clone()) for x in written_by(func, args, kwargs)]
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def restore(self):
        for x, old in reversed(self.before):
            x.copy_(old)
        self.before.clear()

    def replay(self):
        Graph.replayed += 1
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tensors_of(out), tensors_of(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # views and what is written in place are right already
                    old.copy_(new)


class Waits(TorchDispatchMode):
    """torch.cuda's debug mode, which warns of what makes the host wait."""

    on = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(func.overloadpacket.__name__.startswith(one) for one in WAITS):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return func(*args, **(kwargs or {}))

    @classmethod
    def set(cls, mode):
        if mode:
            cls.on = cls().__enter__()
        else:
            cls.on.__exit__(None, None, None)


@contextmanager
def recording(graph, pool):
    assert pool == (0, 1)
    Graph.recorded += 1
    try:
        with graph:
            yield
    finally:
        graph.restore()


@pytest.fixture
def graphs(monkeypatch):
    """Graph, whose `recorded` and `replayed` count; torch.cuda's graphs are these."""
    Graph.recorded = Graph.replayed = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    stand_in(monkeypatch)
    return Graph


def stand_in(monkeypatch):
    """For what torch.cuda has around graphs."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", Waits.set)

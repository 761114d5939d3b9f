"""Which steps run, which are recorded and which are replayed; on a device: tests/gpu/test_decoding_gpu.py."""

from contextlib import contextmanager

import pytest
import torch
from recorded_graphs import graphs as recorded  # noqa: F401
from recorded_graphs import stand_in

from opcd_fast.runtime import graphs


class FakeGraph:
    """Records and replays a function as torch.cuda's graphs do: what is recorded does not run."""

    made = 0

    def __init__(self):
        FakeGraph.made += 1

    def replay(self):
        log.append("replay")


log = []


@pytest.mark.parametrize("fails", [False, True])
def test_the_second_step_of_a_shape_is_recorded(fails, monkeypatch, caplog):
    def step():
        if recording and fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        log.append("recorded" if recording else "ran")

    recording = []

    @contextmanager
    def graph(of, pool):
        recording.append(1)
        try:
            yield
        finally:
            recording.clear()

    log.clear()
    FakeGraph.made = 0
    monkeypatch.setattr(graphs, "_told", set())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    stand_in(monkeypatch)
    for _ in range(2):
        captured = graphs.CapturedSteps()
        for shape in (1, 1, 1, 1, 2, 2, 2, 3, 1):
            captured(shape, step)
    once = ["ran", "recorded", "replay", "replay", "replay", "ran", "recorded", "replay", "replay", "ran", "replay"]
    assert log == (["ran"] * 18 if fails else once * 2)
    assert FakeGraph.made == (2 if fails else 4)
    assert caplog.text.count("without a CUDA graph") == fails


def test_a_step_that_waits_for_the_device_is_never_recorded(recorded, monkeypatch, caplog):  # noqa: F811
    """A capture that fails would leave the allocator in the middle of it."""
    monkeypatch.setattr(graphs, "_told", set())
    captured, kept, x = graphs.CapturedSteps(), graphs.KeptSteps(100), torch.zeros(3)
    for _ in range(3):
        captured(1, lambda: x.add_(float(x.sum()) + 1))
    assert x.tolist() == [21.0] * 3 and recorded.recorded == 0
    assert caplog.text.count("waits for the device") == 1
    kept.keep("key", captured, 1)
    assert not captured.recorded and not kept.kept, "buffers without a graph are of no use"

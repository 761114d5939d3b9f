"""Vocabulary-parallel and FSDP2-sharded heads: two gloo processes against one."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharded_heads_worker.py")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_ranks_equal_one(backend, tmp_path):
    if backend == "triton":
        pytest.importorskip("triton")
    rendezvous = f"file://{tmp_path / 'store'}"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", rendezvous, backend],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in ranks]
    for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output[-3000:]}"
        assert "all equal" in output

"""Small calls of every Triton kernel at odd sizes under compute-sanitizer, where the machine has it.

`python -m benchmarks.gpu.memcheck DEVICE` makes the calls alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import ROOT
from benchmarks.schema import Values, value
from benchmarks.session import Session, Skip, Wrong
from opcd_fast.kernels.reference import DIVERGENCES
from opcd_fast.loss import fused_linear_divergence, fused_linear_logprobs

CUDA = Path("/usr/local/cuda/bin")
SHAPES = ((5, 37, 16), (3, 4099, 24), (67, 1003, 40))  # rows, vocabulary, width
TOOLS = ("memcheck", "racecheck")
WRONG = 99  # exit status


def run(session: Session) -> None:
    for tool in TOOLS if not session.dry else ("none",):
        session.row(tool, lambda tool=tool: _under(session, tool), needs=20)


def _under(session: Session, tool: str) -> Values:
    found = shutil.which("compute-sanitizer") or shutil.which(str(CUDA / "compute-sanitizer"))
    if found is None and not session.dry:
        raise Skip(f"there is no compute-sanitizer in PATH or {CUDA}")
    # Without a cache every tensor is an allocation of its own, so that what lies beside it is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    watched = [] if session.dry else [str(found), "--tool", tool, "--error-exitcode", str(WRONG)]
    command = [*watched, sys.executable, "-m", "benchmarks.gpu.memcheck", session.device.type]
    seconds = max(5.0, session.left() - 2)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    lines = [line for line in done.stdout.splitlines() if "=========" in line and line.strip("= ")]
    if done.returncode:
        raise Wrong(" ".join((lines or done.stderr.splitlines()[-3:])[:6]), {})
    return {"calls": value(int(done.stdout.split("calls: ")[1].split()[0]), "1")}


def calls(device: torch.device) -> int:
    """How many were made: every divergence with a trained head, by differences with a frozen one; log-probabilities."""
    made = 0
    for number, (n, v, d) in enumerate(SHAPES):
        generator = torch.Generator(device).manual_seed(number)

        def drawn(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).bfloat16()

        weight, other, h_t = drawn(v, d), drawn(v, d), drawn(n, d)
        ids = torch.randint(v, (n,), generator=generator, device=device)
        for divergence, entry in DIVERGENCES.items():
            ways = [("separate", other)] + [("difference", weight)] * (entry.code is not None)
            for projection, teacher in ways:
                h_s, trained = drawn(n, d).requires_grad_(), projection == "separate"
                head = weight.clone().requires_grad_() if trained else weight
                fused_linear_divergence(h_s, head, h_t, teacher, divergence=divergence, projection=projection,
                                        token_ids=ids).backward()  # fmt: skip
                made += 1
        fused_linear_logprobs(drawn(n, d).requires_grad_(), weight, ids).sum().backward()
        made += 1
    return made


if __name__ == "__main__":
    print(f"calls: {calls(torch.device(sys.argv[1]))}")

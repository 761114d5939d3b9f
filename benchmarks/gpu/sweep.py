"""Block and warps of every Triton kernel at a training step's size, into a table that the launchers read.

The table goes to the results as launch_shapes.json, and to .cache/gpu/ in the tree, where `scripts/gpu.sh second` finds
it while the machine is still held. Kernels of which nothing was measured keep their packaged entries.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import ROOT
from benchmarks.measure import release, timed
from benchmarks.schema import Values, value
from benchmarks.session import Session, Wrong
from opcd_fast.kernels.reference import STATISTICS, Logits
from opcd_fast.kernels.triton import divergence_rows, launch_shapes, logprob_rows, merge_attention
from opcd_fast.loss.chunks import pitch_of

TABLE = "launch_shapes.json"
KEPT = ROOT / ".cache" / "gpu" / TABLE
# A lane holds 4 to 16 elements of a side; the packaged shape first: what is measured at all is comparable.
WIDE = ((2048, 8), (4096, 8), (4096, 16), (2048, 4), (1024, 4), (2048, 16), (1024, 8), (4096, 32), (8192, 16),
        (8192, 32))  # fmt: skip
SOME = ((2048, 8), (4096, 16), (4096, 8), (1024, 4), (2048, 4))
TILES = ((2048, 4), (1024, 4), (1024, 2), (2048, 8), (4096, 8), (4096, 4), (8192, 16))
SHAPES = {"divergence_rows": WIDE, "merge_attention": TILES, "logprob_rows": SOME}
WIDEST = 2**31 - 1
NARROW = 49_152  # a second width for the kernel that matters most, up to twice as many columns
ERROR = 2**-7  # of bf16 gradients of two shapes, which sum in another order


@dataclass
class Launch:
    call: Callable[[], Any]
    nbytes: int  # read and written at least
    result: Tensor  # what the last call wrote


def run(session: Session) -> None:
    device = session.device
    rows, columns, tokens = (3, 1003, 5) if session.dry else (1024, 151_936, 32_768)
    builds: dict[str, Callable[[], Launch]] = {
        "divergence_rows": partial(gated_kl, device, rows, columns),
        "merge_attention": partial(merge, device, tokens, 32, 128),
        "logprob_rows": partial(logprob, device, rows, columns),
    }
    best: dict[str, tuple[int, int]] = {}
    for kernel, build in builds.items():
        best[kernel] = _swept(session, kernel, kernel, build)
        if best[kernel][0]:
            _write(session, best, (0, 0))  # at once: the time may be over before the next one is done
    narrow = _swept(
        session, "divergence_rows", f"divergence_rows, V {NARROW}",
        partial(gated_kl, device, 3 if session.dry else 2048, 700 if session.dry else NARROW),
    )  # fmt: skip
    session.row("table", lambda: _write(session, best, narrow), settings={"file": TABLE})


def _swept(session: Session, kernel: str, name: str, build: Callable[[], Launch]) -> tuple[int, int]:
    """The fastest of the shapes, (0, 0) if none was measured. A row for each."""
    made: list[Launch] = []  # once for all of them
    first: list[Tensor] = []

    def measure(block: int, warps: int) -> Values:
        if not made:
            made.append(build())
        (launch,) = made
        with launch_shapes.forced_shape(kernel, block, warps):
            launch.result.fill_(float("nan"))
            launch.call()
            rows = launch.result[:64].float()
            first.append(rows) if not first else None
            found = timed(launch.call, session.device, 0.15)
        values = {"time": found, "rate": value(launch.nbytes / (found.value or 1.0) / 1e9, "TB/s")}
        difference = float((rows - first[0]).norm() / first[0].norm())
        if not difference <= ERROR:
            raise Wrong(f"differs by {difference:.1e} from the first shape", values)
        return values

    times: dict[tuple[int, int], float] = {}
    for block, warps in SHAPES[kernel][: 2 if session.dry else None]:
        found = session.row(f"{name}, {block} x {warps}", partial(measure, block, warps), needs=4,
                            shape={"block": block, "warps": warps}, settings={"kernel": kernel})  # fmt: skip
        if found and found["time"].value:
            times[block, warps] = found["time"].value
    made.clear()
    first.clear()
    release(session.device)
    return min(times, key=lambda shape: times[shape], default=(0, 0))


def _write(session: Session, best: dict[str, tuple[int, int]], narrow: tuple[int, int]) -> Values:
    table = json.loads(launch_shapes.PACKAGED.read_text(encoding="utf-8"))
    head = session.head()
    table["source"] = {"device": head.device.name, "date": head.date[:10], "commit": head.git_commit or "unknown"}
    for kernel, (block, warps) in best.items():
        if not block:
            continue
        kept = [entry for entry in table[kernel] if entry[0] < NARROW // 2] if kernel != "merge_attention" else []
        if kernel == "divergence_rows" and narrow[0]:
            kept.append([2 * NARROW, *narrow])
        table[kernel] = [*kept, [WIDEST, block, warps]]
    text = json.dumps(table, indent=1) + "\n"
    path = session.folder / TABLE
    path.write_text(text)
    launch_shapes.read_table(path)
    if not session.dry:
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        KEPT.write_text(text)
    return {kernel: value(block, "columns") for kernel, (block, _) in best.items()}


# --- one launch of each kernel ------------------------------------------------------------------------------


def gated_kl(device: torch.device, rows: int, columns: int) -> Launch:
    """As the trainer asks for it: all statistics, a bf16 gradient. Two passes over both logits, one write."""
    z_s, z_t, weights, statistics, gradient = _row_inputs(device, rows, columns)
    call = partial(divergence_rows, z_s, z_t, weights, statistics, gradient, divergence="gated_kl")
    return Launch(call, rows * columns * (4 * 4 + 2), gradient)


def logprob(device: torch.device, rows: int, columns: int) -> Launch:
    z, _, weights, statistics, gradient = _row_inputs(device, rows, columns)
    ids = torch.randint(columns, (rows,), device=device)
    call = partial(logprob_rows, z, ids, weights, statistics[:2], gradient)
    return Launch(call, rows * columns * (2 * 4 + 2), gradient)


def merge(device: torch.device, tokens: int, heads: int, width: int) -> Launch:
    """The small tile of logsumexps is not counted."""
    outs = [torch.randn(tokens, heads, width, device=device).bfloat16() for _ in range(2)]
    lses = [torch.randn(tokens, heads, device=device) for _ in range(2)]
    result = torch.empty_like(outs[0])
    call = partial(merge_attention, outs[0], lses[0], outs[1], lses[1], out=result)
    return Launch(call, 3 * result.numel() * 2, result)


def _row_inputs(device: torch.device, rows: int, columns: int) -> tuple[Logits, Logits, Tensor, Tensor, Tensor]:
    """Peaked logits of two models that are near each other, in buffers as loss/chunks/loop.py cuts them; weights,
    statistics, gradient."""
    pitch = pitch_of(columns)
    z_s = torch.randn(rows, pitch, device=device).mul_(2.0)
    z_s[:, :: max(1, columns // 7)] += 9.0
    z_t = torch.randn(rows, pitch, device=device).mul_(0.1).add_(z_s)
    weights = torch.rand(rows, device=device) + 0.5
    gradient = torch.empty(rows, pitch, dtype=torch.bfloat16, device=device)
    statistics = torch.zeros(len(STATISTICS), rows, device=device)
    student, teacher = (Logits(z[:, :columns], temperature=0.9) for z in (z_s, z_t))
    return student, teacher, weights, statistics, gradient[:, :columns]

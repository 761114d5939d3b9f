"""Block and warps of every Triton kernel at a training step's size, into a table that the launchers read.

The table goes to the results as launch_shapes.json, and to .cache/gpu/ in the tree, where `scripts/gpu.sh second` finds
it while the machine is still held. Kernels of which nothing was measured keep their packaged entries.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

from torch import Tensor

from benchmarks.environment import ROOT
from benchmarks.gpu import launches
from benchmarks.gpu.launches import Launch
from benchmarks.measure import release, timed
from benchmarks.schema import Values, value
from benchmarks.session import Session, Wrong
from opcd_fast.kernels.triton import launch_shapes

TABLE = "launch_shapes.json"
KEPT = ROOT / ".cache" / "gpu" / TABLE
# A lane holds 4 to 16 elements of a side; the packaged shape first: what is measured at all is comparable.
WIDE = ((2048, 8), (4096, 8), (4096, 16), (2048, 4), (1024, 4), (2048, 16), (1024, 8), (4096, 32), (8192, 16),
        (8192, 32))  # fmt: skip
SOME = ((2048, 8), (4096, 16), (4096, 8), (1024, 4), (2048, 4))
TILES = ((2048, 4), (1024, 4), (1024, 2), (2048, 8), (4096, 8), (4096, 4), (8192, 16))
WIDEST = 2**31 - 1
ERROR = 2**-7  # of bf16 gradients of two shapes, which sum in another order
NARROW = 49_152  # a second width for the kernel that matters most, up to twice as many columns


def run(session: Session) -> None:
    device, dry = session.device, session.dry
    shapes = {"reverse_kl_rows": WIDE, "merge_attention": TILES, "logprob_rows": SOME, "divergence_rows": SOME}
    best: dict[str, tuple[int, int]] = {}
    for kernel, build in launches.large(device, dry).items():
        best[kernel] = _swept(session, kernel, kernel, build, shapes[kernel])
        if best[kernel][0]:
            _write(session, best, (0, 0))  # at once: the time may be over before the next one is done
    narrow = _swept(
        session, "reverse_kl_rows", f"reverse_kl_rows, V {NARROW}",
        partial(launches.reverse_kl, device, 3 if dry else 2048, 700 if dry else NARROW), WIDE,
    )  # fmt: skip
    session.row("table", lambda: _write(session, best, narrow), settings={"file": TABLE})


def _swept(
    session: Session, kernel: str, name: str, build: Callable[[], Launch], shapes: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
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
        values = {
            "time": found,
            "rate": value(launch.nbytes / (found.value or 1.0) / 1e9, "TB/s"),
        }
        difference = float((rows - first[0]).norm() / first[0].norm())
        if not difference <= ERROR:
            raise Wrong(f"differs by {difference:.1e} from the first shape", values)
        return values

    times: dict[tuple[int, int], float] = {}
    for block, warps in shapes[:2] if session.dry else shapes:
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
        if kernel == "reverse_kl_rows" and narrow[0]:
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

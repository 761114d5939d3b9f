"""A model of the loss's time: what each kernel has to compute and to move, at speeds that an H100 or H200 reaches.

Nothing here was measured but the H200's two ceilings. Logit bytes are counted from the code: ours
(`opcd_fast/loss/chunks/loop.py`, `kernels/triton/reverse_kl.py`), TRL 1.16's `trl/kernels/chunked_divergence.py`, and
Liger-Kernel 0.8.5's `liger_kernel/ops/fused_linear_jsd.py`, with bf16 inputs. Our rows are those that the planner gives
(`opcd_fast/loss/chunks/workspace.py`). Left out: launches, what a cache saves, the hidden states' own traffic, several
reads per softmax; for the peers also what becomes of dW after its sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from opcd_fast.loss.chunks.spec import Spec, Wanted
from opcd_fast.loss.chunks.workspace import (
    MULTIPROCESSORS,
    TILE_COLUMNS,
    TILE_ROWS,
    Plan,
    Side,
    make_plan,
    output_tiles,
)
from opcd_fast.loss.scratch import Shape as Seen


@dataclass(frozen=True)
class Device:
    name: str
    flops: float  # operations per second of a large bf16 product on random data
    bandwidth: float  # bytes per second
    multiprocessors: int
    source: str


H100 = Device("H100", 800e12, 3.0e12, MULTIPROCESSORS[9, 0], "assumed")
H200 = Device("H200", 790e12, 4.3e12, MULTIPROCESSORS[9, 0], "measured: a large product, a large copy")
DEVICES = (H200, H100)


@dataclass(frozen=True)
class Shape:
    N: int
    V: int
    D: int
    frozen: bool = False

    def product_seconds(self, device: Device) -> float:
        return 2 * self.N * self.V * self.D / device.flops

    def with_frozen_head(self) -> Shape:
        return Shape(self.N, self.V, self.D, True)


SHAPES = (Shape(16_384, 151_936, 1024), Shape(16_384, 151_936, 4096), Shape(16_384, 256_000, 2304))
Rows = Callable[[Shape, Device], int]  # of one run of a kernel


@dataclass(frozen=True)
class Kernel:
    name: str
    rows: Rows
    # Of a run of so many rows: (rows, columns and length of the sums of a product); None: it multiplies nothing.
    product: Callable[[Shape, int], tuple[int, int, int]] | None = None
    logit_bytes: float = 0  # moved per logit, of N V
    head_bytes: float = 0  # moved per element of the head, of V D, each time it runs
    trained_only: bool = False  # does not run when the head is frozen

    def runs(self, shape: Shape, device: Device) -> list[int]:
        """The rows of each."""
        rows = min(self.rows(shape, device), shape.N)
        return [min(rows, shape.N - first) for first in range(0, shape.N, rows)]

    def operations(self, shape: Shape) -> float:
        return 2.0 * shape.N * shape.V * shape.D if self.product else 0.0

    def arithmetic(self, shape: Shape, device: Device) -> float:
        """Seconds at the full speed of the device."""
        return self.operations(shape) / device.flops

    def in_waves(self, shape: Shape, device: Device) -> float:
        """Seconds when output tiles are computed whole, one by each multiprocessor at a time, and no sum is split."""
        if self.product is None:
            return 0.0
        of_one_tile = 2 * TILE_ROWS * TILE_COLUMNS * device.multiprocessors / device.flops
        seconds = 0.0
        for rows in self.runs(shape, device):
            height, width, length = self.product(shape, rows)
            waves = -(-output_tiles(height, width) // device.multiprocessors)
            seconds += waves * of_one_tile * length
        return seconds

    def moved(self, shape: Shape, device: Device) -> float:
        """Bytes."""
        runs = len(self.runs(shape, device))
        return self.logit_bytes * shape.N * shape.V + self.head_bytes * runs * shape.V * shape.D

    def traffic(self, shape: Shape, device: Device) -> float:
        """Seconds."""
        return self.moved(shape, device) / device.bandwidth


@dataclass(frozen=True)
class Implementation:
    name: str
    kernels: tuple[Kernel, ...]

    def products(self) -> int:
        return sum(kernel.product is not None for kernel in self.kernels)

    def logit_bytes(self) -> float:
        return sum(kernel.logit_bytes for kernel in self.kernels)

    def row_bytes(self) -> float:
        """What kernels other than matrix products move per logit."""
        return sum(kernel.logit_bytes for kernel in self.kernels if not kernel.product)

    def running(self, shape: Shape) -> list[Kernel]:
        return [kernel for kernel in self.kernels if not (shape.frozen and kernel.trained_only)]

    def seconds(self, shape: Shape, device: Device) -> tuple[float, float]:
        """(if all traffic of a kernel hides behind its arithmetic or the other way round and every multiprocessor is
        busy, if nothing overlaps and tiles come in waves)."""
        least = most = 0.0
        for kernel in self.running(shape):
            traffic = kernel.traffic(shape, device)
            least += max(kernel.arithmetic(shape, device), traffic)
            most += kernel.in_waves(shape, device) + traffic
        return least, most


def bound(shape: Shape, device: Device) -> float:
    """Seconds of the bare products."""
    return (3 if shape.frozen else 4) * shape.product_seconds(device)


def plan(shape: Shape, device: Device) -> Plan:
    """How our loss cuts its default workspace there."""

    def seen(rows: int, place: int) -> Seen:
        return Seen((rows, shape.D), torch.bfloat16, True, place)

    student, teacher = Side(seen(shape.N, 1), seen(shape.V, 2)), Side(seen(shape.N, 3), seen(shape.V, 4))  # type: ignore
    spec = Spec(shape.V, backend="triton", all_statistics=True)
    wanted = Wanted(True, not shape.frozen, False)
    return make_plan(shape.N, [student, teacher], shape.V, spec, wanted, 0, device.multiprocessors)


def _fixed(rows: int) -> Rows:
    return lambda shape, device: rows


def _once(shape: Shape, device: Device) -> int:
    return shape.N


def _logit_rows(shape: Shape, device: Device) -> int:
    return plan(shape, device).logit_rows


def _gradient_rows(shape: Shape, device: Device) -> int:
    return plan(shape, device).gradient_rows


def _liger_rows(shape: Shape, device: Device) -> int:
    """Its chunk before Blackwell: the next power of two of N over (V / D rounded up)."""
    rows = -(-shape.N // -(-shape.V // shape.D))
    return min(shape.N, 1 << (rows - 1).bit_length())


def _logits(rows: Rows, suffix: str = "") -> tuple[Kernel, Kernel]:
    """float32 out, bf16 head in."""
    return tuple(
        Kernel(f"{side} logits{suffix}", rows, lambda shape, rows: (rows, shape.V, shape.D), 4, 2)
        for side in ("student", "teacher")
    )  # type: ignore[return-value]


def _dh(rows: Rows) -> Kernel:
    """bf16 G and head in."""
    return Kernel("dH", rows, lambda shape, rows: (rows, shape.D, shape.V), 2, 2)


def _dw(rows: Rows, sum_bytes: int) -> Kernel:
    """bf16 G in, the sum in and out."""
    return Kernel("dW", rows, lambda shape, rows: (shape.V, shape.D, rows), 2, sum_bytes, trained_only=True)


def _ours(name: str, row_bytes: float) -> Implementation:
    return Implementation(
        name,
        (
            *_logits(_logit_rows),
            Kernel("row kernel", _logit_rows, logit_bytes=row_bytes),
            _dh(_gradient_rows),
            _dw(_gradient_rows, 8),
            Kernel("cast of dW", _once, head_bytes=6, trained_only=True),
            Kernel("scaling in backward", _once, head_bytes=4, trained_only=True),
        ),
    )


OURS = _ours("opcd_fast, row kernel of two passes", 18)
ONE_READ = _ours("opcd_fast, row kernel of one read", 10)
_TRL_ROWS = _fixed(4096)
TRL = Implementation(
    "TRL 1.16",
    (
        *_logits(_TRL_ROWS),
        Kernel("statistics", _TRL_ROWS, logit_bytes=8),
        *_logits(_TRL_ROWS, ", again"),
        Kernel("gradient", _TRL_ROWS, logit_bytes=12),
        Kernel("cast of G", _TRL_ROWS, logit_bytes=6),
        _dh(_TRL_ROWS),
        _dw(_TRL_ROWS, 8),
    ),
)
LIGER = Implementation(
    "Liger-Kernel 0.8.5, fused",
    (
        *_logits(_liger_rows),
        # temperature 16, log-softmaxes 16, softmax 8, zeroed losses 4, JSD kernel 16, sums 8, the softmax's
        # Jacobian 28, cast 6
        Kernel("elementwise", _liger_rows, logit_bytes=102),
        _dh(_liger_rows),
        _dw(_liger_rows, 4),  # the sum in the head's dtype
    ),
)
IMPLEMENTATIONS = (OURS, ONE_READ, TRL, LIGER)


def markdown() -> list[str]:
    """The model's tables."""
    lines = [
        "**Model, unmeasured on a device**, but for the H200's ceilings. N = 16,384; bf16 inputs. The smaller time "
        "lets each kernel's memory traffic hide behind its arithmetic and keeps every multiprocessor busy. In the "
        f"larger one nothing overlaps, and products come in whole tiles of {TILE_ROWS} x {TILE_COLUMNS}, one for each "
        "multiprocessor at a time, as they do where the library does not split their sums. `benchmarks/roofline.py` "
        "says what is counted.",
    ]
    for device in DEVICES:
        lines += ["", *_device_table(device)]
    for shape in (SHAPES[0], SHAPES[0].with_frozen_head()):
        lines += ["", *_kernel_table(shape, H200)]
    return lines


def _device_table(device: Device) -> list[str]:
    lines = [
        f"{device.name}: {device.flops / 1e12:.0f} TFLOP/s, {device.bandwidth / 1e12:.1f} TB/s ({device.source}), "
        f"{device.multiprocessors} multiprocessors.",
        "",
        "| | products, full / frozen | B per logit, row kernels | B per logit, all | "
        + " | ".join(f"ms at D = {s.D:,}, V = {s.V:,}: full (of bound); frozen (of bound)" for s in SHAPES)
        + " |",
        "|---|---|---|---|" + "---|" * len(SHAPES),
        "| bare products | 4 / 3 | | | "
        + " | ".join(f"{1e3 * bound(s, device):.0f}; {1e3 * bound(s.with_frozen_head(), device):.0f}" for s in SHAPES)
        + " |",
    ]
    for one in IMPLEMENTATIONS:
        cells = [
            "; ".join(_of_bound(one, shape, device) for shape in (full, full.with_frozen_head())) for full in SHAPES
        ]
        count = one.products()
        lines.append(
            f"| {one.name} | {count} / {count - 1} | {one.row_bytes():g} | {one.logit_bytes():g} | "
            + " | ".join(cells)
            + " |"
        )
    return lines


def _of_bound(one: Implementation, shape: Shape, device: Device) -> str:
    least, most = one.seconds(shape, device)
    low, high = bound(shape, device) / most, bound(shape, device) / least
    return f"{1e3 * least:.0f} to {1e3 * most:.0f} ({low:.0%} to {high:.0%})"


def _kernel_table(shape: Shape, device: Device) -> list[str]:
    lines = [
        f"Kernel by kernel, {OURS.name}, {device.name}, D = {shape.D:,}, V = {shape.V:,}, "
        f"{'frozen' if shape.frozen else 'full'}:",
        "",
        "| kernel | rows at once | TFLOP | GB | FLOP per byte | fill of waves | ms of arithmetic, in waves | "
        "ms of traffic |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kernel in OURS.running(shape):
        flop, moved = kernel.operations(shape), kernel.moved(shape, device)
        waves = kernel.in_waves(shape, device)
        fill = f"{kernel.arithmetic(shape, device) / waves:.0%}" if waves else ""
        lines.append(
            f"| {kernel.name} | {max(kernel.runs(shape, device)):,} | {flop / 1e12:.1f} | {moved / 1e9:.1f} | "
            f"{flop / moved:.0f} | {fill} | {1e3 * waves:.1f} | {1e3 * kernel.traffic(shape, device):.1f} |"
        )
    return lines

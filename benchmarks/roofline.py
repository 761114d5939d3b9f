"""A model of the time on an H100: what each kernel has to compute and to move, at speeds that it can reach.

Nothing here was measured on a device. Logit bytes are counted from the code: ours (`opcd_fast/chunks.py`,
`kernels/reverse_kl_rows.py`), TRL 1.16's `trl/kernels/chunked_divergence.py`, and Liger-Kernel 0.8.5's
`liger_kernel/ops/fused_linear_jsd.py`, with bf16 inputs and a trained head. Left out: launches, what a cache saves,
the hidden states' own traffic, a GEMM library's distance from its peak, several reads per softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FLOPS = 800e12  # operations per second of a large bf16 product, as an H100 reaches on random data
BANDWIDTH = 3.0e12  # bytes per second that an H100 moves


@dataclass(frozen=True)
class Shape:
    N: int
    V: int
    D: int

    @property
    def product_seconds(self) -> float:
        return 2 * self.N * self.V * self.D / FLOPS


SHAPES = (Shape(16_384, 151_936, 1024), Shape(16_384, 151_936, 4096), Shape(16_384, 256_000, 2304))


@dataclass(frozen=True)
class Kernel:
    name: str
    products: int = 0  # of 2 N V D operations
    logit_bytes: float = 0  # moved per logit, of N V
    head_bytes: float = 0  # moved per element of the head, of V D, each time it runs
    trained_only: bool = False  # does not run when the head is frozen

    def arithmetic(self, shape: Shape) -> float:
        """Seconds."""
        return self.products * shape.product_seconds

    def traffic(self, shape: Shape, rows: int) -> float:
        """Seconds, when it runs once for so many rows."""
        runs = -(-shape.N // rows)
        return (self.logit_bytes * shape.N * shape.V + self.head_bytes * runs * shape.V * shape.D) / BANDWIDTH


@dataclass(frozen=True)
class Implementation:
    name: str
    kernels: tuple[tuple[Kernel, Callable[[Shape], int]], ...]  # with the rows of one run

    def products(self) -> int:
        return sum(kernel.products for kernel, _ in self.kernels)

    def logit_bytes(self) -> float:
        return sum(kernel.logit_bytes for kernel, _ in self.kernels)

    def row_bytes(self) -> float:
        """What kernels other than matrix products move per logit."""
        return sum(kernel.logit_bytes for kernel, _ in self.kernels if not kernel.products)

    def seconds(self, shape: Shape, *, frozen: bool = False) -> tuple[float, float]:
        """(if all traffic of a kernel hides behind its arithmetic or the other way round, if nothing overlaps)."""
        least = most = 0.0
        for kernel, rows in self.kernels:
            if frozen and kernel.trained_only:
                continue
            arithmetic, traffic = kernel.arithmetic(shape), kernel.traffic(shape, rows(shape))
            least += max(arithmetic, traffic)
            most += arithmetic + traffic
        return least, most


def bound(shape: Shape, *, frozen: bool = False) -> float:
    """Seconds of the bare products."""
    return (3 if frozen else 4) * shape.product_seconds


def _all(rows: int, *kernels: Kernel) -> tuple[tuple[Kernel, Callable[[Shape], int]], ...]:
    return tuple((kernel, lambda shape: rows) for kernel in kernels)


def _liger_rows(shape: Shape) -> int:
    """Its chunk before Blackwell: the next power of two of N over (V / D rounded up)."""
    rows = -(-shape.N // -(-shape.V // shape.D))
    return min(shape.N, 1 << (rows - 1).bit_length())


_LOGIT_ROWS, _GRADIENT_ROWS = 1024, 4096  # what 2.5 GiB of workspace hold at V = 151,936
_LOGITS = (Kernel("student logits", 1, 4, 2), Kernel("teacher logits", 1, 4, 2))  # float32 out, bf16 head in
_DH = Kernel("dH", 1, 2, 2)  # bf16 G and head in
_DW = Kernel("dW", 1, 2, 8, trained_only=True)  # bf16 G in, the float32 sum in and out

OURS = Implementation(
    "opcd_fast, row kernel of two passes",
    _all(_LOGIT_ROWS, *_LOGITS, Kernel("row kernel", 0, 18)) + _all(_GRADIENT_ROWS, _DH, _DW),
)
ONE_READ = Implementation(
    "opcd_fast, row kernel of one read",
    _all(_LOGIT_ROWS, *_LOGITS, Kernel("row kernel", 0, 10)) + _all(_GRADIENT_ROWS, _DH, _DW),
)
TRL = Implementation(
    "TRL 1.16",
    _all(
        4096,
        *_LOGITS,
        Kernel("statistics", 0, 8),
        *(Kernel(f"{kernel.name}, again", kernel.products, kernel.logit_bytes, 2) for kernel in _LOGITS),
        Kernel("gradient", 0, 12),
        Kernel("cast of G", 0, 6),
        _DH,
        _DW,
    ),
)
LIGER = Implementation(
    "Liger-Kernel 0.8.5, fused",
    tuple(
        (kernel, _liger_rows)
        for kernel in (
            *_LOGITS,
            # temperature 16, log-softmaxes 16, softmax 8, zeroed losses 4, JSD kernel 16, sums 8, the softmax's
            # Jacobian 28, cast 6
            Kernel("elementwise", 0, 102),
            _DH,
            Kernel("dW", 1, 2, 4, trained_only=True),  # the sum in the head's dtype
        )
    ),
)
IMPLEMENTATIONS = (OURS, ONE_READ, TRL, LIGER)


def markdown() -> list[str]:
    """The model's two tables."""
    lines = [
        "**Model, unmeasured on a device.** "
        f"{FLOPS / 1e12:.0f} TFLOP/s and {BANDWIDTH / 1e12:.1f} TB/s, which an H100 reaches; N = 16,384; bf16 inputs. "
        "The smaller time lets each kernel's memory traffic hide behind its arithmetic, the larger one hides nothing. "
        "`benchmarks/roofline.py` says what is counted.",
        "",
        "| | products, full / frozen | B per logit, row kernels | B per logit, all | "
        + " | ".join(f"ms at D = {s.D:,}, V = {s.V:,}: full (of bound); frozen" for s in SHAPES)
        + " |",
        "|---|---|---|---|" + "---|" * len(SHAPES),
        "| bare products | 4 / 3 | | | "
        + " | ".join(f"{1e3 * bound(s):.0f}; {1e3 * bound(s, frozen=True):.0f}" for s in SHAPES)
        + " |",
    ]
    for one in IMPLEMENTATIONS:
        cells = []
        for shape in SHAPES:
            full, frozen = one.seconds(shape), one.seconds(shape, frozen=True)
            low, high = (bound(shape) / seconds for seconds in reversed(full))
            cells.append(f"{_span(full)} ({low:.0%} to {high:.0%}); {_span(frozen)}")
        count = one.products()
        lines.append(
            f"| {one.name} | {count} / {count - 1} | {one.row_bytes():g} | {one.logit_bytes():g} | "
            + " | ".join(cells)
            + " |"
        )
    shape = SHAPES[0]
    lines += [
        "",
        f"Kernel by kernel, {OURS.name}, D = {shape.D:,}, V = {shape.V:,}:",
        "",
        "| kernel | TFLOP | GB | FLOP per byte | ms of arithmetic | ms of traffic |",
        "|---|---|---|---|---|---|",
    ]
    for kernel, rows in OURS.kernels:
        arithmetic, traffic = kernel.arithmetic(shape), kernel.traffic(shape, rows(shape))
        flop, moved = arithmetic * FLOPS, traffic * BANDWIDTH
        lines.append(
            f"| {kernel.name} | {flop / 1e12:.1f} | {moved / 1e9:.1f} | {flop / moved:.0f} | "
            f"{1e3 * arithmetic:.1f} | {1e3 * traffic:.1f} |"
        )
    return lines


def _span(seconds: tuple[float, float]) -> str:
    return f"{1e3 * seconds[0]:.0f} to {1e3 * seconds[1]:.0f}"

"""The matrix products of the fused losses: logits from hidden states, and gradients from the logits' gradient.

Every product writes the compute dtype (float32, or float64), whatever its inputs are: bf16 on a device through a
GEMM with a float32 output, everything else through tiles of the weight that are upcast as they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from opcd_fast.kernels.csrc import native
from opcd_fast.loss.chunks.workspace import Side, runs_native, same_memory
from opcd_fast.runtime import full_precision

HALF_SUMS = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")  # of torch.backends.cuda.matmul


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """`full_precision`, sums in float32 for float16 products, and kernels on the device that holds the tensors."""
    with full_precision(device):
        if device.type != "cuda":
            yield
            return
        settings = torch.backends.cuda.matmul
        switched_on = [name for name in HALF_SUMS if getattr(settings, name)]
        with torch.cuda.device(device):
            for name in switched_on:
                setattr(settings, name, False)
            try:
                yield
            finally:
                for name in switched_on:
                    setattr(settings, name, True)


class Weight:
    """A head's weight, handed to GEMMs in tiles of the dtype they need."""

    def __init__(self, side: Side, dtype: torch.dtype, tile: int, backend: str, shares: Weight | None = None):
        self.weight, self.tile = side.weight, tile
        self.native = runs_native(side)
        # For the logits alone; the gradients' products have a float32 operand.
        self.bf16_dot = (
            backend == "native"
            and side.h.dtype == side.weight.dtype == torch.bfloat16
            and dtype == torch.float32
            and side.weight.stride(1) == 1
            and native.has_bf16_dot()
        )
        self.buffer: Tensor | None = None
        if shares is not None and self.native == shares.native and same_memory(self.weight, shares.weight):
            self.buffer = shares.buffer
        elif not self.native and self.weight.dtype != dtype:
            self.buffer = torch.empty(tile, self.weight.shape[1], dtype=dtype, device=self.weight.device)

    def tiles(self) -> range:
        return range(0, self.weight.shape[0], self.tile)

    def at(self, start: int) -> Tensor:
        part = self.weight[start : start + self.tile]
        if self.buffer is None:
            return part
        return self.buffer[: part.shape[0]].copy_(part)


def operand_dtype(side: Side, dtype: torch.dtype) -> torch.dtype:
    """What the side's hidden states must be for its GEMMs."""
    return side.h.dtype if runs_native(side) else dtype


def take(h: Tensor, active: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start..stop of the active ones."""
    rows = h[start:stop] if active is None else h.index_select(0, active[start:stop])
    return rows.to(dtype)


def _product(h: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = h @ weight.T, accumulated and stored in out's dtype."""
    if h.dtype == out.dtype:
        torch.mm(h, weight.t(), out=out)
    else:
        torch.mm(h, weight.t(), out_dtype=out.dtype, out=out)


def project(hidden: list[Tensor], weights: list[Weight], logits: list[Tensor]) -> None:
    """logits = hidden @ weight.T for every side, by the same GEMMs over the same tiles: a different accumulation
    order on one side alone would be an error of up to 1 % of the gradient at small KL."""
    tiled = []
    for h, weight, z in zip(hidden, weights, logits, strict=True):
        if weight.bf16_dot:
            # h was bf16 before it was made float32. The library reads rows, which a transposed tensor has not.
            native.project_bf16(h.bfloat16().contiguous(), weight.weight, z)
        else:
            tiled.append((h, weight, z))
    for start in tiled[0][1].tiles() if tiled else ():
        buffer: Tensor | None = None
        for h, weight, z in tiled:
            if buffer is None or weight.buffer is not buffer:
                tile, buffer = weight.at(start), weight.buffer
            _product(h, tile, z[:, start : start + weight.tile])


def half_product(operand: Tensor, head: Tensor, out: Tensor, tile: int) -> None:
    """out = operand @ head.T, all float16, added up in float32 and rounded once.

    tile: rows of the head at a time where no GEMM does that, and it is multiplied in float32."""
    if operand.is_cuda:
        torch.mm(operand, head.t(), out=out)
        return
    wide = operand.float()
    for rows, part in zip(head.split(tile), out.split(tile, dim=1), strict=True):
        part.copy_(wide @ rows.float().t())


def hidden_gradient(g: Tensor, h: Tensor, weight: Weight) -> Tensor:
    """G W in the compute dtype, (m, D). g: (m, V); h: (m, D) as multiplied."""
    if weight.native:
        return torch.mm(g, weight.weight, out_dtype=torch.float32)
    part = torch.zeros(h.shape, dtype=g.dtype, device=g.device)
    for start in weight.tiles():
        part.addmm_(g[:, start : start + weight.tile], weight.at(start))
    return part


def add_weight_gradient(
    dw: Tensor, g: Tensor, h: Tensor, weight: Weight, factor: float = 1.0, fresh: bool = False
) -> None:
    """dW += factor * G.T h, accumulated in dw's dtype. dw: (V, D); fresh: it holds nothing yet, not even zeros."""
    beta = 0.0 if fresh else 1.0
    if weight.native:
        torch.addmm(dw, g.t(), h, beta=beta, alpha=factor, out_dtype=dw.dtype, out=dw)
    else:
        dw.addmm_(g.t(), h, beta=beta, alpha=factor)


def scale_(tensor: Tensor, factor: float | Tensor) -> Tensor:
    """tensor * factor, in place."""
    return tensor.mul_(factor) if isinstance(factor, Tensor) or factor != 1.0 else tensor


def scale_into(source: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out = source * factor, a scalar; multiplied in the wider of their two dtypes and rounded once to out's, which may
    be source itself. One kernel on a device, without a copy."""
    # With a dimension it counts in the promotion of types: a scalar 1/3 would be rounded to bf16 first.
    factor = factor.reshape([1] * source.ndim)
    # A CPU casts through temporaries, hence slices.
    rows = source.shape[0] if source.is_cuda else 4096
    for part, target in zip(source.split(rows), out.split(rows), strict=True):
        torch.mul(part, factor, out=target)
    return out

"""One model's half of a row operation: raw products, and what makes logits of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

OWN_SCRATCH = 1 << 24  # bytes of each scratch plane where the caller brings none


class Logits(NamedTuple):
    """logits / temperature = softcap(scale * (z + bias)) / temperature, with softcap(x) = softcap * tanh(x / softcap).

    Gradients are with respect to z, so they carry the derivatives of softcap, scale and 1 / temperature.
    """

    z: Tensor  # (n, V) raw products h @ W.T
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    factors: Tensor | None = None  # (n,) float32, powers of two by which z, in float16, is to be multiplied first

    @property
    def derivative(self) -> float:
        """Of the logits with respect to z, but for the softcap's part."""
        return self.scale / self.temperature

    def inner_and_outer(self) -> tuple[float, float]:
        """logits / temperature = inner * x, or outer * tanh(inner * x) with a softcap; x = z + bias."""
        if self.softcap is None:
            return self.derivative, 1.0
        return self.scale / self.softcap, self.softcap / self.temperature

    def rows(self, rows: slice) -> Logits:
        return self._replace(z=self.z[rows])

    def transform_(self) -> Tensor:
        """z as logits / temperature, in place."""
        inner, outer = self.inner_and_outer()
        if self.bias is not None:
            self.z.add_(self.bias)
        if inner != 1.0:
            self.z.mul_(inner)
        return self.z if self.softcap is None else self.z.tanh_().mul_(outer)

    def slope(self, out: list[Tensor], wanted: bool) -> Tensor | None:
        """The softcap's part of the derivative, once z is transformed, in the plane that `out` has for it."""
        if self.softcap is None or not wanted:
            return None
        # d softcap(u) / du = 1 - tanh(u / softcap)^2, and tanh(u / softcap) = z * temperature / softcap
        return out[0].copy_(self.z).mul_(self.temperature / self.softcap).square_().neg_().add_(1.0)

    def blocks(self, scratch: Tensor | None, planes: int) -> tuple[Tensor, Iterator[slice]]:
        """Scratch (planes, block, V), the caller's or a new one, and the rows block by block.

        On a CPU a block stays in cache between the passes over it.
        """
        n, columns = self.z.shape
        if scratch is None:
            block = max(1, OWN_SCRATCH // (columns * self.z.element_size()))
            scratch = self.z.new_empty(planes, min(block, n), columns)
        return scratch, slices(n, scratch.shape[1])


def slices(n: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, n)) for start in range(0, n, block))


def column(x: Tensor) -> Tensor:
    """(n,) as (n, 1)."""
    return x.unsqueeze(-1)

"""One layer's keys and values as a prefix keeps them: in their own type, or in eight bits with scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

QUANTISED_TYPES = {"float8_e4m3fn": torch.float8_e4m3fn}
"""Names of the types that `StoredLayer.quantise` knows."""

_LARGEST = 448.0  # of float8_e4m3fn


def storage_type(name: str | torch.dtype | None) -> torch.dtype | None:
    """The type called `name`; None for the model's own. Raises ValueError for a type that prefixes are not kept in."""
    if name is None or name in QUANTISED_TYPES.values():
        return name  # type: ignore[return-value]
    if name not in QUANTISED_TYPES:
        raise ValueError(f"prefix_dtype: expected None or {' or '.join(map(repr, QUANTISED_TYPES))}, got {name!r}")
    return QUANTISED_TYPES[str(name)]


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """Keys (1, H_kv, kept, d_k) and values (1, H_kv, kept, d_v) of one layer; (1, 0, 0, 0) where it has none.

    With scales they are in float8_e4m3fn: key = keys * key_scale, value = values * value_scale. Keys have one scale
    for each channel (1, H_kv, 1, d_k), because RoPE and biases leave single channels far larger than the others;
    values one for each head (1, H_kv, 1, 1). Scales are float32.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def kept(self) -> int:
        """Tokens whose keys are there."""
        return self.keys.shape[-2]

    @property
    def tensors(self) -> list[Tensor]:
        """All it holds, in the order in which `with_tensors` takes them."""
        return [x for x in (self.keys, self.values, self.key_scale, self.value_scale) if x is not None]

    def with_tensors(self, tensors: list[Tensor]) -> StoredLayer:
        return StoredLayer(*tensors)

    def quantise(self, dtype: torch.dtype) -> StoredLayer:
        """In `dtype`, float8_e4m3fn; itself if it is that already.

        Rounding is at most 2^-4 of each number (three bits of mantissa) down to 2^-14 of the largest one that shares
        its scale, and 2^-18 of that one below. It is done once, in float32.
        """
        if self.key_scale is not None:
            return self
        keys, key_scale = _quantised(self.keys, (-2,), dtype)
        values, value_scale = _quantised(self.values, (-2, -1), dtype)
        return StoredLayer(keys, values, key_scale, value_scale)

    def dequantised(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(keys, values) in `dtype`: these tensors themselves when they are in it already."""
        if self.key_scale is None or self.value_scale is None:
            return self.keys.to(dtype), self.values.to(dtype)
        return _scaled(self.keys, self.key_scale, dtype), _scaled(self.values, self.value_scale, dtype)


def _quantised(x: Tensor, shared: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` in `dtype` and its scales, one for all numbers along the dimensions `shared`."""
    if x.numel() == 0:
        return x.to(dtype), x.new_ones(1, dtype=torch.float32)
    exact = x.float()
    largest = exact.abs().amax(shared, keepdim=True)
    scale = torch.where(largest > 0, largest / _LARGEST, 1.0)
    # Rounding of the quotient may lead past the largest number, which not every version of torch saturates at.
    return (exact / scale).clamp_(-_LARGEST, _LARGEST).to(dtype), scale


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Eight bits fit in every compute type exactly; the product is rounded once, from float32.
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.mul(x.to(dtype), scale, out=out)

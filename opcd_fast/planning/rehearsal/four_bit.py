"""Layers as bitsandbytes packs them, with its bytes and without its arithmetic: rehearsals need no bitsandbytes.

A packed weight of n numbers takes n / 2 bytes, n / 64 for the scales of its blocks, rounded to 8 bits, and n / 4096 for
the scales of those. Each product makes the whole weight anew in the compute type, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opcd_fast.models import seam

_BLOCK, _BLOCK_OF_SCALES = 64, 256


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        out = torch.nn.functional.linear(x, x.new_empty(shape), bias)
        return out.clone()  # peft copies the output of a layer of 4 bits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ grad.new_empty(ctx.shape), None, None


class FourBitLinear(nn.Linear):
    """In place of `layer`."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        count, old = layer.weight.numel(), layer.weight
        blocks = -(-count // _BLOCK)
        self.weight = nn.Parameter(old.new_empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        self.scales = old.new_empty(blocks, dtype=torch.uint8)
        self.scales_of_scales = old.new_empty(-(-blocks // _BLOCK_OF_SCALES), dtype=torch.float32)
        self.codes = old.new_empty(16 + 256 + 1, dtype=torch.float32)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x.to(self.dtype), self.bias, (self.out_features, self.in_features)).to(x.dtype)

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """A name by which peft knows that the weight has to be asked for (DoRA reads it)."""
        return self.weight

    def dequantize(self) -> Tensor:
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype)


def packed(model: Any, dtype: torch.dtype) -> Any:
    """`model`, whose body's linear layers are packed in place, as `quantize_4bit` packs them."""
    for parent in list(seam.body_of(model).modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, FourBitLinear(layer, dtype))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False)

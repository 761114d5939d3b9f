"""Products of a few rows with a stored weight on a CPU, the other way round: (W xᵀ)ᵀ in place of x Wᵀ.

Decoding multiplies as many rows as there are answers with every weight of the model. For 8 to 48 rows, weights stored
row by row (as models are loaded) and more than one thread, MKL is faster when the weight is the left factor. Measured
with two threads on SmolLM2-135M (benchmarks/results/decoding): decoding takes 0.81 to 0.93 of the time. A copy with the
adapter folded in (`merged.py`) stores its weights the other way, which is faster still, and is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEWEST_ROWS, MOST_ROWS = 8, 48
SMALLEST = 128  # a weight's shorter side; adapters' products are smaller


@contextmanager
def thin_products(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model's plain linear layers multiply few rows the faster way; results differ by rounding alone.

    By rule and not by timing, so that a run which is repeated rounds as it did. Without gradients. Layers on other
    devices, in other types than float32 or of other classes are left alone.
    """
    measured = torch.get_num_threads() > 1 and torch.backends.mkl.is_available()
    layers = [layer for layer in model.modules() if _gains(layer)] if measured else []
    try:
        for layer in layers:
            layer.forward = partial(_product, layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _gains(layer: nn.Module) -> TypeGuard[nn.Linear]:
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    return (
        type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and min(weight.shape) >= SMALLEST
    )


def _product(layer: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002  the name that nn.Linear's callers may use
    rows = input.numel() // input.shape[-1]
    if not FEWEST_ROWS <= rows <= MOST_ROWS or input.dtype != torch.float32:
        return F.linear(input, layer.weight, layer.bias)
    out = torch.mm(layer.weight, input.reshape(rows, -1).t()).t().contiguous()
    if layer.bias is not None:
        out += layer.bias
    return out.view(*input.shape[:-1], -1)
